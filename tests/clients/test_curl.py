"""The commands that README.md shows run as they are written."""

from __future__ import annotations

import json
import re
import subprocess

from tests.clients.conftest import PORT, ROOT

_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def curl_commands(markdown: str) -> list[str]:
    """Every command that begins a line of a code block with curl, with the lines that it goes on in."""
    text = "\n".join(_BLOCK.findall(markdown))
    starts = [match.start() for match in re.finditer(r"^(?:\$ )?curl ", text, re.MULTILINE)]
    commands = []
    for start in starts:
        command = ""
        for line in text[start:].removeprefix("$ ").splitlines():
            command += line + "\n"
            if not line.endswith("\\") and command.count("'") % 2 == 0:
                break
        commands.append(command)
    return [command for command in commands if f":{PORT}" in command]


def test_the_curl_commands_of_the_readme_are_answered(server: str) -> None:
    commands = curl_commands((ROOT / "README.md").read_text())
    assert commands, f"README.md shows no curl command for port {PORT}"
    answers = []
    for command in commands:
        ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, f"{command}{ran.stderr}"
        lines = [line for line in ran.stdout.splitlines() if line]
        if lines[0].startswith("data: "):
            assert lines[-1] == "data: [DONE]", command
            lines = [line.removeprefix("data: ") for line in lines[:-1]]
        else:
            lines = [ran.stdout]
        read = [json.loads(line) for line in lines]
        assert all("error" not in each for each in read), f"{command}{ran.stdout}"
        answers.append((command, read))
    objects = {each.get("object") for _, read in answers for each in read}
    assert {"chat.completion", "chat.completion.chunk"} & objects
