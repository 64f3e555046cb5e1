"""Run the command line in this process."""

from click.testing import CliRunner, Result

from onnxprune import cli


def run(*args: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.commands, [str(arg) for arg in args])


def ok(*args: object) -> Result:
    """Run a command that succeeds."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result
