"""What the documents say: messages that exist, commands of the tutorial that are the commands there are, pages in the menu."""

import ast
import re
from pathlib import Path

from typer.testing import CliRunner

from schemas.config import load_config
from stages.tools.cli import MODULES, app

ROOT = Path(__file__).parents[1]


def said(path: Path) -> list[str]:
    """Every piece of text in a module, strings that stand side by side joined."""
    return [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_every_message_that_is_explained_exists() -> None:
    texts = "\n".join(
        text
        for folder in ("pipeline", "schemas", "stages", "train")
        for path in (ROOT / folder).rglob("*.py")
        for text in said(path)
    )
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`(.*?)`", row)]
    assert len(quoted) > 15 and [text for text in quoted if text not in texts] == []


def test_the_tutorials_config_is_one(tmp_path: Path) -> None:
    """Its commands are run by CI, in an environment of their own."""
    page = (ROOT / "docs/start.md").read_text()
    blocks = re.findall(r"<!-- tutorial -->\n```bash\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```bash") == 6
    (written,) = re.findall(r"cat > mine.yaml <<'EOF'\n(.*?)EOF\n", "".join(blocks), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(written)
    assert load_config(tmp_path / "mine.yaml").run == "mine"


def test_every_command_that_the_documents_name_is_there() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "config/README.md"]
    named = {name for page in pages for name in re.findall(r"(?:`|^|&& )opd ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert len(named) > 8 and named <= set(MODULES)
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
