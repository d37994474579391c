"""Commands of the command line, as tests give them."""

from fastgen import cli

TINY = ["--set", "channels=4", "--set", "layers=1", "--batch-size", "8", "--validate-every", "2", "--device", "cpu"]


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments):
    """Runs a command that must fail with exit status 2 and one line on stderr; returns the line."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1, (status, lines)
    return lines[0]
