"""Put the passes into the wheel, whatever became of the link to them.

`fxprune/passes` is a symbolic link to `passes/`. A checkout may lose it: git on Windows writes a
text file in its place, some zip tools drop it. So the wheel takes the passes from `passes/` itself;
an editable installation, which runs from the checkout, cannot do without the link and says so.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LOST_LINK = (
    "this checkout has lost the link fxprune/passes -> ../passes, which an editable installation "
    "needs. Restore it: rm -f fxprune/passes && ln -s ../passes fxprune/passes "
    "(on Windows: del fxprune\\passes & mklink /J fxprune\\passes passes)"
)


class PassesHook(BuildHookInterface[Any]):
    """Add `passes/` as `fxprune/passes` to wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the folder to include, or refuse an editable installation that would not run."""
        if version != "editable":
            build_data["force_include"]["passes"] = "fxprune/passes"
        elif not Path(self.root, "fxprune", "passes").is_dir():
            raise RuntimeError(LOST_LINK)
