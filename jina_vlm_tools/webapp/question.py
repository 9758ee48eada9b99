"""The line where a question is asked, which every tab has."""

from typing import Any

import gradio as gr


def add_question(
    button: str, placeholder: str, label: str, prefix: str = "", **settings: Any
) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """
    Add it to the row that is open.

    Args:
        button: What sends the question.
        prefix: Of the parts' ids on the page.
        settings: Of the text.

    Returns:
        The text, the button that sends it, and one that stops what is going on, not visible yet.
    """
    question = gr.Textbox(
        placeholder=placeholder,
        show_label=False,
        label=label,
        container=False,
        scale=8,
        min_width=120,
        lines=1,
        max_lines=4,
        elem_id=f"{prefix}question",
        **settings,
    )
    send = gr.Button(button, variant="primary", scale=1, min_width=84, elem_id=f"{prefix}send")
    stop = gr.Button("Stop", variant="stop", scale=1, min_width=84, visible=False, elem_id=f"{prefix}stop")
    return question, send, stop
