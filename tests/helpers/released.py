"""What a release brings along."""

# Its own chat template, which expects two variables
RELEASED_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first or always_start_with_space %} {% endif %}"
    "{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ image_prompt_token if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}"
)

# What its template renders, as two ports transcribe it: a space, the role, a colon and a space, then the parts, each
# text with a space behind it; what asks for an answer brings no space of its own
TRANSCRIBED_TEMPLATE = (
    "{% for message in messages %}"
    "{{ (' ' if not loop.first or always_start_with_space else '') ~ message['role'] | capitalize ~ ': ' }}"
    "{% set parts = message['content'] %}"
    "{% set parts = [{'type': 'text', 'text': parts}] if parts is string else parts %}"
    "{% for part in parts %}"
    "{{ image_prompt_token if part['type'] == 'image' else part['text'] ~ ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
