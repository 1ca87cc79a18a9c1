"""What all verbs share: the exit codes and the list of verbs."""

from pathlib import Path

from dsv2.cli.base import ExitCode, main

COMMANDS = Path(__file__).parents[3] / "docs" / "commands.md"


def test_the_page_and_the_usage_have_every_exit_code_with_its_meaning(capsys):
    assert main(["--help"], []) == 0
    usage = capsys.readouterr().out
    page = COMMANDS.read_text().replace("`", "")
    for code in ExitCode:
        assert f"| {code:d} | {code.meaning} |" in page
        assert code.meaning in usage
