"""The generated sections of READMEs: a component's from its signature, docstring and metadata.yaml; the tables of
formats and of models.

Run after a change to a component, a format or the tested models: `make readmes`.
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import docstring_parser
import yaml

from components.prepare.formats import FORMATS, convert
from components.stages import STAGE_NAMES

ROOT = Path(__file__).resolve().parent.parent.parent
START, END = "<!-- generated: component -->", "<!-- /generated -->"
FORMATS_START = "<!-- generated: formats -->"
MODELS_START = "<!-- generated: models -->"

Row = tuple[str, str, str]
"""Name, type and meaning of an input or output."""
RETURNED = {"String": "str", "Float": "float", "Boolean": "bool", "Integer": "int"}


def load_component(stage: str) -> Any:
    """A stage's KFP component."""
    return getattr(importlib.import_module(f"components.{stage}.component"), stage)


def section(component: Any, metadata: dict[str, Any]) -> str:
    """The generated section of a component's README, between its markers."""
    image = component.component_spec.implementation.container.image.rpartition("/")[2].partition(":")[0]
    dependencies = metadata["dependencies"]
    needs = [f"Kubeflow {need['name']} {need['version']}" for need in dependencies["kubeflow"]]
    needs += [f"{need['name']} {need['version']}" for need in dependencies.get("external_services", [])]
    inputs, outputs = interface(component)
    parts = [START, f"Image `{image}`. Stability: {metadata['stability']}. Needs {', '.join(needs)}."]
    parts += [_table("input", inputs), _table("output", outputs), END]
    return "\n\n".join(parts)


def interface(component: Any) -> tuple[list[Row], list[Row]]:
    """The inputs and outputs of a component, as its signature and docstring tell them.

    Raises:
        ValueError: the docstring leaves one out, or names another.
    """
    name, function, spec = component.name, component.python_func, component.component_spec
    documented = docstring_parser.parse(inspect.getdoc(function))
    meanings = {argument.arg_name: argument.description for argument in documented.params}
    parameters = inspect.signature(function).parameters
    if list(meanings) != list(parameters):
        differing = sorted(meanings.keys() ^ parameters.keys()) or "their order"
        raise ValueError(f"{name}: docstring and signature differ in {differing}")
    inputs: list[Row] = []
    outputs: list[Row] = []
    for argument, parameter in parameters.items():
        kind = (get_args(parameter.annotation) or (parameter.annotation,))[0]
        rows = outputs if argument in spec.outputs else inputs
        rows.append((argument, kind.__name__, meanings[argument]))
    # KFP calls a single returned value `Output`; of several it reads the meanings itself.
    alone = documented.returns.description if documented.returns else None
    for output in [name for name in spec.outputs if name not in parameters]:
        meaning = alone if output == "Output" else spec.outputs[output].description
        if not meaning:
            raise ValueError(f"{name}: `Returns:` says nothing of {output}")
        outputs.append((output, RETURNED[spec.outputs[output].type], meaning))
    return inputs, outputs


def formats() -> str:
    """What `kubealign data add` reads: each format with a row and what it becomes, from the readers themselves."""
    lines = ["| format | written by | a row | becomes |", "|---|---|---|---|"]
    for name, entry in FORMATS.items():
        row = json.dumps(entry.example, ensure_ascii=False).replace("|", "\\|")
        if entry.kind == "unpaired":
            result = "recognised, not trained on yet"
        else:
            (found,) = convert(entry.example, name)
            turns = "; ".join(f"{turn['role']}: {turn['content']}" for turn in found.prompt)
            what = " against ".join(found.answers) if entry.kind == "preferences" else found.answers[0]
            result = f"{turns} → {what}"
        lines.append(f"| `{name}` | {entry.about} | `{row}` | {result} |")
    return "\n\n".join([FORMATS_START, "\n".join(lines), END])


def models() -> str:
    """The architectures that `tests/training/test_model_matrix.py` walks through all stages."""
    from tests.support.architectures import ARCHITECTURES, EVERY_TIME, PACKABLE

    lines = ["| architecture | class | rows of tokens | walked by |", "|---|---|---|---|"]
    for name, (kind, _) in ARCHITECTURES.items():
        rows = "packed" if name in PACKABLE else "one sequence at a time"
        tests = "`make test`, `make test-models`" if name in EVERY_TIME else "`make test-models`"
        lines.append(f"| `{name}` | {kind.removesuffix('Config')} | {rows} | {tests} |")
    return "\n\n".join([MODELS_START, "\n".join(lines), END])


def renewed(text: str, generated: str, start: str = START) -> str:
    """A README with its generated section replaced.

    Raises:
        ValueError: the README has no such section.
    """
    found, count = re.subn(f"{start}.*?{END}", lambda _: generated, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one section between {start} and {END}, found {count}")
    return found


def expected(folder: Path) -> str:
    """What the README in a component's folder should say."""
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    return renewed(readme, section(load_component(folder.name), metadata))


def _table(what: str, rows: list[Row]) -> str:
    lines = [f"| {what} | type | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {' '.join(meaning.split())} |" for name, kind, meaning in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    for stage in STAGE_NAMES:
        folder = ROOT / "components" / stage
        (folder / "README.md").write_text(expected(folder), encoding="utf-8")
    for folder, made, start in (("prepare", formats(), FORMATS_START), ("engine", models(), MODELS_START)):
        readme = ROOT / "components" / folder / "README.md"
        readme.write_text(renewed(readme.read_text(encoding="utf-8"), made, start), encoding="utf-8")
