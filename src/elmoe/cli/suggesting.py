"""A group of verbs that names the nearest one when a verb is mistyped."""

from __future__ import annotations

from difflib import get_close_matches

import click


class SuggestingGroup(click.Group):
    """As click's group; an unknown verb is refused with what may have been meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb and its arguments; UsageError with the nearest verbs."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            verbs = self.list_commands(ctx)
            near = get_close_matches(name.lower(), verbs, 2)
            told = f"did you mean {' or '.join(near)}?" if near else f"the verbs are {', '.join(verbs)}"
            ctx.fail(f"there is no verb '{name[:60]}': {told}")
        return super().resolve_command(ctx, args)
