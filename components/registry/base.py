"""base.json of a version that was registered as an adapter: the base model in the registry."""

from typing import NotRequired

from typing_extensions import TypedDict


class BaseReference(TypedDict):
    """The base model's version, and its files."""

    reference: str
    """models:/name/version."""
    files: dict[str, str]
    """sha256 of every file by its path."""
    precision: NotRequired[str]
    """`bf16` if the adapter was trained on the base rounded to it; version 0.1 did not write it."""
