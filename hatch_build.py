"""Makes README.md fit for a package index, where its relative links would lead nowhere.

No public address of the repository is known. So a link to a file of the source becomes its text and the file's path.
When an address is known, let README_LINK's replacement begin with it instead.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

README_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)[^)]*\)")


def readme_for_index(text: str) -> str:
    """Return a README in which each relative link is its text and the path of the file in the source."""
    return README_LINK.sub(r"\1 (`\2` in the source)", text)


class ReadmeHook(MetadataHookInterface):
    """Sets the project's readme."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the rewritten README into the metadata."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": readme_for_index(text)}
