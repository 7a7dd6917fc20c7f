"""Tables and texts side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mixtura.report.markup import Html, escape


def table_html(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    highlight: Iterable[int] = (),
    highlight_columns: Iterable[int] = (),
) -> Html:
    """A table; columns that hold numbers in every row are aligned right.

    Args:
        headers: one per column.
        rows: cells as text (numbers already formatted); the first cell of a row names the row. Rows may
            be shorter than the headers.
        caption: what the table shows; its name for screen readers too.
        highlight: numbers of rows to set apart, such as the chosen one.
        highlight_columns: numbers of columns to set apart.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    numeric = [
        _is_numeric([row[column] for row in cells if column < len(row)]) for column in range(len(headers))
    ]
    marked = set(highlight)
    own = {number: ["chosen"] for number in highlight_columns}
    classes = [_classes([*(["n"] if numeric[i] else []), *own.get(i, [])]) for i in range(len(headers))]
    head = "".join(f"<th scope=col{classes[i]}>{escape(name)}</th>" for i, name in enumerate(headers))
    body = []
    for number, row in enumerate(cells):
        first = f"<th scope=row{classes[0]}>{escape(row[0])}</th>" if row else ""
        rest = "".join(f"<td{classes[i]}>{escape(cell)}</td>" for i, cell in enumerate(row) if i)
        body.append(f"<tr{' class=chosen' if number in marked else ''}>{first}{rest}</tr>")
    # Above the part that scrolls, so that a long caption stays in view on a phone.
    label = f"<p class=caption>{escape(caption)}</p>" if caption else ""
    name = escape(caption or "table")
    # Focusable, so that a wide table can be scrolled with the keyboard.
    return Html(
        f'{label}<div class=scroll role=region tabindex=0 aria-label="{name}"><table aria-label="{name}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _classes(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" class={names[0]}" if len(names) == 1 else f' class="{" ".join(names)}"'


def _is_numeric(column: Sequence[str]) -> bool:
    filled = [cell for cell in column if cell not in ("", "–")]
    return bool(filled) and all(cell.lstrip("<≤≥±+−-~ ")[:1].isdigit() for cell in filled)


def side_by_side(texts: Sequence[tuple[str, str]]) -> Html:
    """Texts with headings beside each other (below each other on a phone), spaces kept.

    Args:
        texts: pairs of heading and text.
    """
    columns = (f"<div><h3>{escape(name)}</h3><pre>{escape(text)}</pre></div>" for name, text in texts)
    return Html(f"<div class=beside>{''.join(columns)}</div>")
