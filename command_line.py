"""What every command of the harness shares in how it explains itself."""

from __future__ import annotations

import argparse


class DefaultsThatSay(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option that has one; "(default: None)" says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default and action.default != 0 or action.default is False:
            return action.help
        return super()._get_help_string(action)
