"""The config names what is wrong with it; its documentation is generated from it."""

import ast
import re
import shutil
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.prompts import collect
from schemas.config import Config, Evaluate, Rollouts, Train, load_config, parse_config
from schemas.config.objective import RECIPES
from schemas.errors import OpdError
from stages.run import console
from stages.run.run import run_of
from stages.tools.cli import app
from stages.tools.config import config_markdown
from stages.tools.config import main as config_keys
from stages.tools.recipes import recipes_markdown

MINIMAL = {"prompts": {"source": "p.jsonl"}, "student": {"model": "a/b"}, "teacher": {"model": "c/d"}}


def test_minimal_config_is_enough_and_survives_a_round_trip() -> None:
    config = parse_config(MINIMAL, "here")
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_kl_is_measured_on_what_the_split_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def items(test: int, **more: object) -> int:
        prompts = {"source": "p.jsonl", "splits": {"test": test}}
        return run_of(parse_config({**MINIMAL, "prompts": prompts, **more}, "here")).kl_items

    assert (items(8), items(100), items(300), items(300, evaluate={"kl_items": 7})) == (8, 100, 100, 7)
    monkeypatch.chdir(tmp_path)
    for table in ("rollouts", "scores"):
        assert len(list(Path().glob("runs/x/round-0/*"))) < 2
        Path(f"runs/x/round-0/{table}").mkdir(parents=True)
        Path(f"runs/x/round-0/{table}/000.parquet").touch()
        # Without scores the teacher is needed anyway; by default there is a second round, which it scores too.
        expected = 0 if table == "scores" else 8
        assert items(8, reuse=["runs/x"], rollouts={"rounds": 1}) == expected
    assert items(8, reuse=["runs/x"], rollouts={"rounds": 2}) == 8


@pytest.mark.parametrize("given", [0, [], [16, 0], [16, 2.5], "16", True, None])
def test_horizons_are_whole_numbers(given: object) -> None:
    with pytest.raises(OpdError, match=r"`rollouts\.max_new_tokens`: takes a number of tokens, or a list"):
        parse_config({**MINIMAL, "rollouts": {"max_new_tokens": given}}, "here")


def test_there_are_no_more_horizons_than_rounds() -> None:
    def horizons(*given: int) -> tuple[int, ...]:
        return parse_config({**MINIMAL, "rollouts": {"rounds": 2, "max_new_tokens": given}}, "here").rollouts.horizons

    assert horizons(16) == (16,) and horizons(16, 32) == (16, 32)
    with pytest.raises(OpdError, match=r"`max_new_tokens: \[16, 32, 64\]` has 3 .* has `rounds: 2`: drop some"):
        horizons(16, 32, 64)


def test_the_shipped_config_is_valid() -> None:
    assert load_config("config/config.yaml").run == "default"


def test_the_examples_are_whole_and_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(Path("examples").glob("*.yaml"))
    listed = re.findall(r"^\* `([\w-]+\.yaml)`", Path("examples/README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [file.name for file in files] and len(files) == 4
    shutil.copytree("examples", tmp_path / "examples")
    round_0 = tmp_path / "runs/default/round-0/scores"  # what one of them reuses
    round_0.mkdir(parents=True)
    (round_0 / "000.parquet").touch()
    shutil.copy("config/config.yaml", tmp_path / "runs/default")
    monkeypatch.chdir(tmp_path)
    for file in files:
        config_keys(file)  # `opd config --check`
        config = load_config(file)
        assert config.run == file.stem
        if config.prompts.source.endswith(".jsonl"):
            splits = collect(config.prompts, config.seed)["split"].to_pylist()
            assert {name: splits.count(name) for name in ("examples", "train", "test")} == {
                "examples": 2,
                "train": 16,
                "test": 6,
            }


def test_a_check_tells_where_credit_has_no_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, credit, told in (("hybrid", "gae", True), ("hybrid", "immediate", False), ("sampled", "gae", False)):
        file = tmp_path / "c.yaml"
        changes = {"prompts": {"source": "org/data"}, "objective": {"recipe": recipe}, "weights": {"credit": credit}}
        file.write_text(yaml.safe_dump(MINIMAL | changes))
        config_keys(file)
        said = "`weights.credit: gae` acts on units longer than a token alone" in " ".join(
            capsys.readouterr().err.split()
        )
        assert said == told


def test_the_papers_that_are_named_are_cited_and_the_licence_is_there() -> None:
    cited = {
        paper["url"].rpartition("/")[2] for paper in yaml.safe_load(Path("CITATION.cff").read_text())["references"]
    }
    named = set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", Path("docs/how.md").read_text()))
    named |= set(re.findall(r"arXiv (\d{4}\.\d{5})", Path("config/README.md").read_text()))
    assert cited == named and len(cited) == 17
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and "Apache License" in Path("LICENSE").read_text()[:200]


def test_pre_commit_runs_what_ci_runs() -> None:
    (repository,) = yaml.safe_load(Path(".pre-commit-config.yaml").read_text())["repos"]
    linters = ("ruff", "snakefmt", "mypy", "lint-imports")
    ci = [line for line in Path(".ci/run").read_text().splitlines() if line.startswith(linters)]
    assert [hook["entry"] for hook in repository["hooks"]] == ci
    # `local` hooks of the environment at hand: nothing is fetched.
    assert repository["repo"] == "local" and {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_config_readme_documents_every_key() -> None:
    assert config_markdown() in Path("config/README.md").read_text(), (
        "run: opd config, and paste it into config/README.md"
    )


def test_the_page_of_recipes_is_what_the_classes_say() -> None:
    assert recipes_markdown() in Path("docs/recipes.md").read_text(), "run: opd recipes --markdown, and paste it there"


def test_every_recipe_is_printed_with_its_source_presets_keys_and_departures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 400)  # nothing is cut or wrapped
    whole = CliRunner().invoke(app, ["recipes"]).output
    for tag, kind in RECIPES.items():
        one = CliRunner().invoke(app, ["recipes", tag]).output
        keys = {f"objective.{key}" for key in kind.model_fields if key != "recipe"}
        said = [kind.source, *kind.departs, *(f"{place.partition('.')[2]}: " for place in kind.presets)]
        assert all(text in whole for text in (tag, *said))
        assert all(text in one for text in (kind.source, *kind.departs, *kind.presets, *keys))
        assert ("weights.credit" in one.partition("reads too")[2].partition("\n")[0]) == kind.reads_credit
        papers = set(re.findall(r"arXiv \d{4}\.\d{5}", kind.__doc__ or ""))
        assert all(paper in kind.source for paper in papers), "the meaning names another paper than the source"
    unknown = CliRunner().invoke(app, ["recipes", "simt"])
    assert unknown.exit_code and "no recipe 'simt'; there are hybrid, simct" in unknown.output


def test_a_check_tells_what_the_recipe_presets_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.yaml"
    changes = {"prompts": {"source": "org/data"}, "objective": {"recipe": "simct"}, "scores": {"k_max": 20}}
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    config_keys(path)
    assert "`scores.k_max: 20`, where `objective.recipe: simct` presets 1024" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_readmes_python_lines_import_what_its_install_line_installs() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    installed = {name_of(given) for given in (*project["dependencies"], *project["optional-dependencies"]["demo"])}
    text = Path("README.md").read_text()
    assert "pip install -e '.[demo]' && snakemake" in text
    lines = re.findall(r'^(.*)python -c "import (\w+)', text, re.MULTILINE)
    assert [module for _, module in lines] == ["polars", "datasets", "duckdb"]
    assert [m for before, m in lines if m not in installed and f"pip install {m} && " not in before] == []


def test_the_conda_environment_lists_the_projects_dependencies() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    listed = yaml.safe_load(Path("config/environment.yaml").read_text())["dependencies"][-1]["pip"]
    # Where both name a package, the extra's bounds are the narrower ones.
    wanted = {name_of(given): given for given in project["dependencies"] + project["optional-dependencies"]["demo"]}
    assert sorted(listed) == sorted(wanted.values())


def test_what_is_imported_is_declared() -> None:
    """On import of a module: by the core; later, within functions: by the core or an extra."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    core = {name_of(given) for given in project["dependencies"]} | {"distributed", "llvmlite"}  # dask's, numba's
    extras = {name_of(given) for some in project["optional-dependencies"].values() for given in some}
    homes = packages_distributions()
    own = {"pipeline", "schemas", "stages", "train"}
    for path in (path for folder in sorted(own) for path in Path(folder).glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in names} - own - set(sys.stdlib_module_names):
                packages = {name_of(home) for home in homes.get(module, [module])}
                at_once = node in tree.body and path.name != "vllm_worker.py"  # which vLLM itself imports
                assert packages & (core if at_once else core | extras), f"{path}: {module}"


def name_of(requirement: str) -> str:
    """A requirement's package, spelled as pip compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=\[; ]", requirement)[0]).lower()


def test_three_lines_of_the_docs_are_enough_for_another_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they don't name is the reused run's: what it stored, with its scored rounds, and no KL, which takes a teacher."""
    docs = [Path(name).read_text() for name in ("README.md", "docs/cache.md")]
    printed = [re.findall(r"```yaml\n((?:(?!```).)*?^reuse:.*?)```", text, re.DOTALL | re.MULTILINE) for text in docs]
    assert [len(blocks) for blocks in printed] == [1, 1]
    default = load_config("config/config.yaml")
    stored = default.model_dump(mode="json") | {"seed": 7, "evaluate": {"kl_items": 5, "extract": "whole"}}
    stored["train"]["learning_rate"] = 1.0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpdError, match=r"comes from runs/default/config\.yaml, which isn't there"):
        parse_config(yaml.safe_load(printed[0][0]), "other.yaml")
    for r in range(2):
        Path(f"runs/default/round-{r}/rollouts").mkdir(parents=True)
        Path(f"runs/default/round-{r}/rollouts/000.parquet").touch()
    Path("runs/default/config.yaml").write_text(yaml.safe_dump(stored))
    for (text,) in printed:
        Path("other.yaml").write_text(text)
        config = load_config("other.yaml")
        assert config.run == "other" and config.student.model != default.student.model
        assert (config.prompts, config.teacher, config.scores) == (default.prompts, default.teacher, default.scores)
        assert config.rollouts == default.rollouts.model_copy(update={"rounds": 2}) and config.seed == 7
        assert config.evaluate == Evaluate(extract="whole") and config.train == Train()
        # What the run itself leaves says all of it, and says the same without the reused run.
        assert parse_config(config.model_dump(mode="json") | {"reuse": ["elsewhere"]}, "").teacher == config.teacher
    assert parse_config(yaml.safe_load(text) | {"seed": 1, "rollouts": {"prompts": 3}}, "").rollouts == Rollouts(
        prompts=3
    )
    # Another run's relative paths are told from here.
    Path("own.jsonl").touch()
    Path("runs/default/config.yaml").write_text(yaml.safe_dump(stored | {"prompts": {"source": "own.jsonl"}}))
    Path("there").mkdir()
    monkeypatch.chdir("there")
    config = parse_config({"student": {"model": "a/b"}, "reuse": ["../runs/default"]}, "")
    assert config.prompts.source == str(tmp_path / "own.jsonl") and config.teacher == default.teacher


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "unknown key `trian`; known keys here: run, seed"),
        ({"train": {"learning_rat": 1}}, "unknown key `train.learning_rat`; known keys here: learning_rate"),
        ({"train": {"learning_rate": "fast"}}, "`train.learning_rate`: input should be a valid number"),
        ({"train": {"learning_rate": "fast"}}, "found 'fast'"),
        ({"rollouts": {"rounds": 0}}, "`rollouts.rounds`: input should be greater than or equal to 1, found 0"),
        ({"student": {}}, "`student.model` is missing"),
        ({"objective": {"recipe": "magic"}}, "`objective.recipe`: input should be 'hybrid', 'simct'"),
        ({"teacher": {"model": "x", "chat": False, "system": "s"}}, "`teacher`: `system` needs a chat template"),
        ({"teacher": {"model": "x", "engine": "vlm"}}, "`teacher.engine`: input should be 'transformers' or 'vllm'"),
        ({"teacher": {"model": "x", "engine_options": {"max_num_seqs": 4}}}, "`engine_options` are for `engine: vllm`"),
        (
            {"teacher": {"model": "x", "engine": "vllm", "engine_options": {"quantization": "fp8"}}},
            "`engine_options` takes tensor_parallel_size, ",
        ),
        ({"student": {"model": "x", "dtype": "float16"}}, "`student.dtype`: float16 overflows in training"),
        (
            {"train": {"ema": 0.99, "min_ess": 0.5}},
            "`min_ess: 0.5` doesn't go with `ema: 0.99`: rounds sample from the average",
        ),
        ({"teacher": {"model": "x", "tuned_on": "y"}}, "`teacher.tuned_on: y` is a key of the student"),
        ({"evaluate": {"split": "dev"}}, "`evaluate.split: dev` needs held-out prompts, but `prompts.splits.dev` is 0"),
        (
            {"evaluate": {"kl_items": 301}},
            "`evaluate.kl_items: 301` is more than `prompts.splits.test` holds, which is 300",
        ),
        ({"run": "../up"}, "`run`: string should match pattern"),
        ({"prompts": 3}, "`prompts`:"),
    ],
)
def test_wrong_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(OpdError) as caught:
        parse_config({**MINIMAL, **change}, "my.yaml")
    text = str(caught.value)
    assert text.startswith("my.yaml: ") and message in text and "\n" not in text


def test_files_that_are_not_configs(tmp_path: Path) -> None:
    for content, message in ((b"a: [", "not YAML"), (b"- 1", "expected a mapping"), (b"\xff\xfe\x00", "not YAML")):
        path = tmp_path / "c.yaml"
        path.write_bytes(content)
        with pytest.raises(OpdError, match=message) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
    with pytest.raises(OpdError, match="No such file"):
        load_config(tmp_path / "none.yaml")
