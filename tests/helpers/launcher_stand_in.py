"""Stand-ins for launchers and schedulers: programs that write down how they were called and end
with given codes."""

import os
import shutil
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"


def stand_in(path: Path, codes: list[int], says: str = "", ended: str = "") -> None:
    """A program that ends with the next of `codes` at every call, and writes `ended`, if there is
    such, into --exit-file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / f"{path.name}.codes").write_text("".join(f"{code}\n" for code in codes))
    path.write_text(f"""#!/usr/bin/env bash
printf '%s|' "$@" >> "$0.calls"; echo >> "$0.calls"
code=$(head -n 1 "$0.codes"); sed -i 1d "$0.codes"
echo "{says}"
while [ $# -gt 1 ]; do
  if [ -n "{ended}" ] && [ "$1" = --exit-file ]; then echo "{ended}" > "$2"; fi
  shift
done
exit "$code"
""")
    path.chmod(0o755)


def calls(path: Path) -> list[list[str]]:
    file = path.parent / f"{path.name}.calls"
    return [line.split("|")[:-1] for line in file.read_text().splitlines()] if file.exists() else []


class HostfileRun:
    """hostfile.sh in a folder of its own, with two hosts. gone: hosts that never answer."""

    def __init__(self, folder: Path, codes: list[int], ended: str = "", gone: str = "none"):
        (folder / "docs" / "launch").mkdir(parents=True)
        self.script = shutil.copy(LAUNCH / "hostfile.sh", folder / "docs" / "launch")
        self.deepspeed = folder / ".venv" / "bin" / "deepspeed"
        stand_in(self.deepspeed, codes, ended=ended)
        self.hosts = folder / "hosts"
        self.hosts.write_text("# ours\none slots=8\n\n two slots=8 # new\n")
        self.bin = folder / "bin"
        self.bin.mkdir()
        ssh = self.bin / "ssh"
        ssh.write_text(f'#!/usr/bin/env bash\n[[ " $* " != *" {gone} "* ]]\n')
        (self.bin / "sleep").write_text("#!/usr/bin/env bash\n")
        for file in self.bin.iterdir():
            file.chmod(0o755)

    def start(self, *flags: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", self.script, "hosts", *flags],
            cwd=self.hosts.parent,
            env=os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
            timeout=240,
        )
