"""Tables in markdown."""


def table(head: list[str], rows: list[list[str]], figures: int = 1, padded: bool = False) -> str:
    """A table whose columns are figures, aligned to the right, from the one of number `figures` on; `padded`: aligned
    as it stands too, for terminals."""
    rule = [*["---"] * figures, *["---:"] * (len(head) - figures)]
    if padded:
        widths = [max(map(len, column)) for column in zip(head, rule, *rows, strict=True)]
        align = [str.ljust] * figures + [str.rjust] * (len(head) - figures)
        head, *rows = (
            [pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)] for line in (head, *rows)
        )
        rule = [cell.rjust(width, "-") for cell, width in zip(rule, widths, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
