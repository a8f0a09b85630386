"""The section `data`."""

import re

from pydantic import Field, field_validator

from components.config.section import Section


class DataConfig(Section):
    """The repository and revision of the data set."""

    repo: str = Field(
        default=".",
        min_length=1,
        description="git repository with the DVC-tracked data: a path, or a URL without user or token in it"
        " (git's credential helpers keep those)",
    )
    path: str = Field(
        default="data",
        pattern=r"^(\.|[\w-][\w.-]*(/[\w-][\w.-]*)*)$",
        description="folder of the repository that holds preferences/ and instructions/, and base_model/ for"
        " model.base=embedded",
    )
    revision: str = Field(
        default="workspace",
        min_length=1,
        description="branch, tag or commit; or `workspace`, a local repository's files as they are",
    )

    @field_validator("repo")
    @classmethod
    def _no_secret(cls, repo: str) -> str:
        if re.match(r"https?://[^/]*@", repo):
            raise ValueError("a user or token in a URL would reach logs; use git's credential helper")
        return repo
