"""The section `data`."""

from pydantic import Field, field_validator

from components.common.urls import check_repository
from components.config.section import Section


class DataConfig(Section):
    """The repository and revision of the data set."""

    repo: str = Field(
        default=".",
        min_length=1,
        description="git repository with the DVC-tracked data: a path, or an https or ssh URL without token or query in"
        " it (git's credential helpers keep those); on Kubeflow https",
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
    def _accepted(cls, repo: str) -> str:
        return check_repository(repo)
