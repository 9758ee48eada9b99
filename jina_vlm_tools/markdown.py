"""Tables in markdown."""


def table(head: list[str], rows: list[list[str]], figures: int = 1) -> str:
    """A table whose columns are figures, aligned to the right, from the one of number `figures` on."""
    lines = [head, [*["---"] * figures, *["---:"] * (len(head) - figures)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
