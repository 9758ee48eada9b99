"""What a release brings along."""

# Its own chat template, which expects two variables
RELEASED_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first or always_start_with_space %} {% endif %}"
    "{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ image_prompt_token if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
