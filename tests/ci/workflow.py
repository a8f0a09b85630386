"""A job of a workflow, run here: its very commands, in their order, under their conditions.

Of GitHub Actions it knows what our workflows use, and fails on anything else, so that a workflow that drifts breaks the
test. Actions that are `uses`d have a stand-in: a checkout is a clone, an upload is a copy.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TOKEN = re.compile(r"\s*(?:(&&)|(\|\|)|(==)|(!=)|(!)|([()])|'([^']*)'|([A-Za-z_][\w.-]*)(\(\))?)")
FUNCTIONS = {"always()", "cancelled()", "success()", "failure()"}


class Job:
    """One run of a job.

    Args:
        file: the workflow.
        name: of the job.
        folder: the runner's work folder, which the checkout fills.
        origin: the git repository.
        contexts: `github`, `vars`, `secrets` and `inputs`.
        environment: of the machine.
    """

    def __init__(
        self, file: Path, name: str, folder: Path, origin: Path, contexts: dict[str, Any], environment: dict[str, str]
    ) -> None:
        self.job = yaml.safe_load(file.read_text())["jobs"][name]
        self.folder, self.origin = folder, origin
        self.contexts = {"inputs": {}, "vars": {}, "secrets": {}, "steps": {}} | contexts
        self.environment = environment
        self.summary, self.outputs, self.path = (
            folder.parent / f"{folder.name}.{kind}" for kind in ("md", "out", "path")
        )
        self.uploaded = folder.parent / f"{folder.name}.artifact"
        self.log = ""
        self.ran: list[str] = []
        self.failed = False

    def run(self) -> bool:
        """Run the steps; False when one failed."""
        for file in (self.summary, self.outputs, self.path):
            file.write_text("")
        if not self.holds(str(self.job.get("if", "true"))):
            return True
        own = {key: self.filled(value) for key, value in self.job.get("env", {}).items()}
        self.contexts["env"] = own
        for step in self.job["steps"]:
            unknown = set(step) - {"name", "id", "if", "uses", "with", "run", "env", "continue-on-error"}
            assert not unknown, f"{unknown} of a step: the stand-in does not know it"
            condition = str(step.get("if", "success()"))
            if not any(word in condition for word in FUNCTIONS):
                condition = f"success() && ({condition})"
            outcome = "skipped"
            if self.holds(condition):
                more = {key: self.filled(value) for key, value in step.get("env", {}).items()}
                outcome = "success" if self._step(step, own | more) else "failure"
                self.failed |= outcome == "failure" and not step.get("continue-on-error")
            if "id" in step:
                found = dict(line.split("=", 1) for line in self.outputs.read_text().splitlines())
                self.contexts["steps"][step["id"]] = {"outcome": outcome, "outputs": found}
            self.outputs.write_text("")
        return not self.failed

    def _step(self, step: dict[str, Any], environment: dict[str, str]) -> bool:
        if "uses" in step:
            self._use(step)
            return True
        self.ran.append(step["run"])
        paths = [*reversed(self.path.read_text().splitlines()), self.environment["PATH"]]
        files = {
            "GITHUB_OUTPUT": str(self.outputs),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_PATH": str(self.path),
            "GITHUB_SHA": self.contexts["github"]["sha"],
            "PATH": os.pathsep.join(paths),
        }
        script = self.folder.parent / f"{self.folder.name}.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "-e", str(script)],  # as GitHub does without `shell`
            cwd=self.folder,
            env=self.environment | environment | files,
            capture_output=True,
            text=True,
            check=False,
        )
        said = f"$ {step['run'].strip()}\n{done.stdout}{done.stderr}"
        self.log += said
        print(f"----- {said}", flush=True)
        return done.returncode == 0

    def _use(self, step: dict[str, Any]) -> None:
        action, _, commit = step["uses"].partition("@")
        assert re.fullmatch(r"[0-9a-f]{40}", commit), step["uses"]
        given = {key: self.filled(value) for key, value in step.get("with", {}).items()}
        if action == "actions/checkout":
            git = ["git", "-c", "advice.detachedHead=false"]
            subprocess.run([*git, "clone", "-q", str(self.origin), str(self.folder)], check=True)
            ref = given.get("ref", self.contexts["github"]["sha"])
            subprocess.run([*git, "checkout", "-q", ref], cwd=self.folder, check=True)
            use_environment(self.folder)
        elif action == "actions/upload-artifact":
            shutil.copytree(self.folder / given["path"], self.uploaded)
        else:
            assert action == "actions/setup-python", f"{action}: the stand-in does not know it"

    def filled(self, text: Any) -> str:
        """A value with its expressions replaced by what they mean."""
        word = str(text).lower() if isinstance(text, bool) else str(text)
        return re.sub(r"\$\{\{(.*?)\}\}", lambda found: _text(self.value(found[1])), word)

    def holds(self, condition: str) -> bool:
        """Whether a condition is true."""
        return bool(self.value(condition))

    def value(self, expression: str) -> Any:
        """What an expression means: names, strings, ==, !=, &&, ||, ! and brackets."""
        words, at = [], 0
        while at < len(expression.rstrip()):
            found = TOKEN.match(expression, at)
            assert found, f"{expression}: the stand-in cannot read it"
            both, either, equal, unequal, negated, bracket, string, name, call = found.groups()
            if name:
                words.append(repr(self._named(name + (call or ""))))
            elif string is not None:
                words.append(repr(string))
            else:
                word = {"&&": " and ", "||": " or ", "!": " not "}
                operator = both or either or equal or unequal or negated or bracket
                words.append(word.get(operator, operator))
            at = found.end()
        return eval("".join(words), {"__builtins__": {}})  # noqa: S307 - of literals and operators only

    def _named(self, name: str) -> Any:
        constants = {"true": True, "false": False, "always()": True, "cancelled()": False}
        constants |= {"success()": not self.failed, "failure()": self.failed}
        if name in constants:
            return constants[name]
        context, *keys = name.split(".")
        assert context in self.contexts, f"{name}: the stand-in does not know it"
        found: Any = self.contexts[context]
        for key in keys:
            found = found.get(key, "") if isinstance(found, dict) else ""
        return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def use_environment(folder: Path) -> None:
    """Give a clone the environment that runs this, as `make setup` would make it."""
    own = folder / ".venv"
    own.mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith(".ready"):
            (own / path.name).symlink_to(path)
    (own / ".ready").touch()
