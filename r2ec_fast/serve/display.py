"""Recommendations on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r2ec_fast.serve.recommender import Recommendations


def show_recommendations(name: str, result: Recommendations) -> None:
    """Print history, reasoning and recommended items of one user as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"\n[bold]{escape(name)}[/bold]")
    console.print(f"history: {escape(' | '.join(result.history))}", highlight=False)
    if result.reasoning is not None:
        console.print(f"reasoning: {escape(result.reasoning)}", highlight=False)
    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("title")
    table.add_column("item")
    table.add_column("score", justify="right")
    for item in result:
        table.add_row(
            str(item.rank), escape(item.title), escape(str(item.item_id)), f"{item.score:.2f}"
        )
    console.print(table)
