"""The commands about API keys: create, list, revoke.

`cli.py` gives them their names. A new key is on stdout once and nowhere else. Knows nothing of
HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from orchestrator.db import keys
from orchestrator.db.database import Database
from orchestrator.reading import JsonOption, existing, print_json
from orchestrator.settings import Settings
from orchestrator.terminal import print_table, say, talk


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="SCOPE", help="read, submit or admin; submit by default."),
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option(metavar="OWNER", help="Whose jobs it sees and makes; the name by default."),
    ] = None,
) -> None:
    """Make an API key and print it; it cannot be shown again.

    Example: penstock keys create alice --scope submit
    """
    with Database.open(Settings.from_env().database_url) as db:
        key, secret = keys.create_key(db, name, scope or ["submit"], owner)
    talk(f"{key.id}: owner {key.owner}, scopes {', '.join(key.scopes)}; keep it, it is shown once")
    say(secret)


def list_keys(as_json: JsonOption = False) -> None:
    """Show the keys: whose, what they may, when used; not the keys themselves.

    Example: penstock keys list
    """
    with existing(Settings.from_env()) as db:
        found = keys.keys(db)
    print_json([asdict(each) for each in found]) if as_json else _table(found)


def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key's id, or its first 12 letters.")],
) -> None:
    """Revoke a key: servers refuse it within half a minute. Cannot be undone.

    Example: penstock keys revoke key_0123456789abcdef
    """
    with existing(Settings.from_env()) as db:
        say(f"revoked {keys.revoke_key(db, key).id}")


def _table(found: Sequence[keys.Key]) -> None:
    header = ("key", "name", "owner", "begins", "scopes", "made (UTC)", "last used", "state")
    rows = [
        (
            *(each.id, each.name, each.owner, each.prefix, " ".join(each.scopes)),
            f"{each.created_at:%Y-%m-%d %H:%M}",
            f"{each.last_used_at:%Y-%m-%d %H:%M}" if each.last_used_at else "-",
            "revoked" if each.revoked_at else "valid",
        )
        for each in found
    ]
    print_table(header, rows, left=len(header))
