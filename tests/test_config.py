"""The config names what is wrong with it; its documentation is generated from it."""

import tomllib
from pathlib import Path

import pytest
import yaml

from schemas.config import Config, load_config, parse_config
from schemas.errors import OpdError
from stages.tools.cli import config_markdown

MINIMAL = {"prompts": {"source": "p.jsonl"}, "student": {"model": "a/b"}, "teacher": {"model": "c/d"}}


def test_minimal_config_is_enough_and_survives_a_round_trip() -> None:
    config = parse_config(MINIMAL, "here")
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_shipped_config_is_valid() -> None:
    assert load_config("config/config.yaml").run == "default"


def test_config_readme_documents_every_key() -> None:
    assert config_markdown() in Path("config/README.md").read_text(), (
        "run: opd config, and paste it into config/README.md"
    )


def test_the_conda_environment_lists_the_projects_dependencies() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    listed = yaml.safe_load(Path("config/environment.yaml").read_text())["dependencies"][-1]["pip"]
    assert sorted(listed) == sorted(project["dependencies"] + project["optional-dependencies"]["demo"])


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
        ({"teacher": {"model": "x", "tuned_on": "y"}}, "`teacher.tuned_on: y` is a key of the student"),
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
