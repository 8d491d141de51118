"""What the documents show on a console, run for real: the same commands, the same outcome."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
BOUND = 90.0
"""Seconds after which a command counts as hanging."""

_HEADING = re.compile(r"#{1,6} (.+)")
_FENCE = re.compile(r"```(\w*)$")
_SERVICE = re.compile(r"(?:\w+=\S+ )*(?:splitferry (?:consume|broker)\b|python service\.py)")
"""What runs until it is stopped."""
_PATH = re.compile(r"(?<![\w.$/}])/(?=(?:etc|srv|mnt)/)")
_DIFFERS = [  # from run to run
    (re.compile(r"\b\d{1,10}-\d{12,20}\b"), "REQUEST"),
    (re.compile(r"\bv\d{13}\b"), "VERSION"),
    (re.compile(r"\b127\.0\.0\.1:\d+"), "SERVER"),
    (re.compile(r"\s+"), " "),
]
_REST = "…"
"""On a line of its own it stands for any lines, within one for any text."""


@dataclass(frozen=True)
class Step:
    """One command, and what stands below it."""

    line: int
    command: str
    shown: Sequence[str]

    @property
    def fails(self) -> bool:
        return any(line.startswith("Error: ") for line in self.shown)

    @property
    def serves(self) -> bool:
        return _SERVICE.match(self.command) is not None


@dataclass
class Section:
    """The console blocks below one heading of a page, as one session."""

    page: Path
    title: str
    steps: list[Step] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.page.name}: {self.title}"


def pages() -> list[Path]:
    ours = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")]
    return ours + sorted(REPOSITORY.glob("docs/**/*.md"))


def blocks(page: Path) -> Iterator[tuple[str, str, int, list[str]]]:
    """The fenced blocks of a page: the heading above, the language, the first line, the lines."""
    title, language, first, inside = "", None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if language is not None and line == "```":
            yield title, language, first, inside
            language = None
        elif language is not None:
            inside.append(line)
        elif fence:
            language, first, inside = fence[1], number + 1, []
        elif line.lstrip().startswith("```"):
            raise AssertionError(f"{page}, line {number}: a block begins with ```LANGUAGE alone")
        elif heading := _HEADING.match(line):
            title = heading[1]
    assert language is None, f"{page}: the block at line {first} does not end"


def sections(page: Path) -> list[Section]:
    """Those that show commands."""
    found: dict[str, Section] = {}
    for title, language, first, lines in blocks(page):
        if language == "console":
            found.setdefault(title, Section(page, title)).steps.extend(_steps(first, lines))
    return list(found.values())


def spans(page: Path) -> list[str]:
    """What stands as code in the text of a page, outside its blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def _steps(first: int, lines: Sequence[str]) -> Iterator[Step]:
    step: Step | None = None
    for number, line in enumerate(lines, first):
        if step is not None and step.command.endswith("\\"):
            step = Step(step.line, f"{step.command}\n{line}", [])
        elif line.startswith("$ "):
            if step is not None:
                yield step
            step = Step(number, line[2:], [])
        else:
            assert step is not None, f"line {number} shows the output of no command"
            step = Step(step.line, step.command, [*step.shown, line])
    if step is not None:
        yield step


def agree(shown: Sequence[str], said: Sequence[str]) -> bool:
    """Whether the output of a run is what a document shows of another one."""
    if not shown:
        return not said
    if shown[0].strip() == _REST:
        return any(agree(shown[1:], said[skipped:]) for skipped in range(len(said) + 1))
    if not said:
        return False
    pattern = ".*".join(re.escape(_shape(part)) for part in shown[0].split(_REST))
    return re.fullmatch(pattern, _shape(said[0])) is not None and agree(shown[1:], said[1:])


def _shape(line: str) -> str:
    for pattern, name in _DIFFERS:
        line = pattern.sub(name, line)
    return line.rstrip()


class Console:
    """A shell in a scratch directory. Absolute paths of the documents lie below that.

    What runs until it is stopped is left running behind the shell, once it has said what is shown
    of it, and so is the service of the systemd unit, whose `systemctl start` and `stop` are
    carried out here: no systemd runs in tests.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], unit: Path) -> None:
        self.directory = directory
        self._environment = dict(environment)
        self._unit = unit
        self._shell: asyncio.subprocess.Process | None = None
        self._services: list[asyncio.subprocess.Process] = []
        self._unit_process: asyncio.subprocess.Process | None = None
        self._logs = 0
        self.codes: list[int] = []
        """Exit codes of what ran on, but for what a command stopped."""

    def path(self, name: str) -> Path:
        """Where the absolute path of a document lies."""
        return self.directory / name.lstrip("/")

    def set(self, name: str, value: str) -> None:
        """A variable of the environment, before the first command."""
        assert self._shell is None
        self._environment[name] = value

    async def run(self, section: Section) -> None:
        """Run its steps in their order. Fails at the first one with another outcome."""
        for step in section.steps:
            await self.step(section, step)

    async def step(self, section: Section, step: Step) -> None:
        code, said = await self.carry_out(step)
        said = [line.replace(f"{self.directory}/", "/") for line in said]
        where = f"{section.page.relative_to(REPOSITORY)}:{step.line}: {step.command}"
        told = "\n".join([f"exit code {code}, and", *said])
        assert (code != 0) is step.fails, f"{where}\n{told}"
        assert step.serves or not step.shown or agree(step.shown, said), f"{where}\n{told}"
        print(where, told, sep="\n")

    async def carry_out(self, step: Step) -> tuple[int, list[str]]:
        """The exit code, and what was said."""
        async with asyncio.timeout(BOUND):
            if control := re.fullmatch(r"systemctl (start|stop) splitferry-consume", step.command):
                return await self._control(control[1])
            assert "systemctl" not in step.command, "only this is understood of systemctl"
            command = _PATH.sub(f"{self.directory}/", step.command)
            if step.serves:
                return await self._serve(command, step.shown)
            return await self._ask(command)

    async def _ask(self, command: str) -> tuple[int, list[str]]:
        shell = self._shell = self._shell or await self._start()
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(f"{{ {command}\n}} </dev/null 2>&1; echo $'\\n\\1'$?\n".encode())
        said = await shell.stdout.readuntil(b"\n\x01")
        code = await shell.stdout.readline()
        return int(code), said.removesuffix(b"\n\x01").decode().splitlines()

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "bash", "--noprofile", "--norc",
            cwd=self.directory,
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**24,
        )  # fmt: skip

    def logged(self) -> str:
        """What all that runs on has said."""
        return "".join(log.read_text() for log in self.directory.glob("service-*.log"))

    def heard(self, event: str) -> bool:
        """Whether something that runs on has logged `event`."""
        return f'"event": "{event}"' in self.logged()

    # ---- what runs on

    async def _serve(self, command: str, shown: Sequence[str]) -> tuple[int, list[str]]:
        code, lines = await self._ask("export -p")
        assert code == 0
        exported = dict(re.findall(r'^declare -x (\w+)="(.*)"$', "\n".join(lines), re.MULTILINE))
        log = await self._begin(["bash", "-c", f"exec {command}\n"], self._environment | exported)
        wanted = [_REST, *shown, _REST]  # among what it logs
        while not agree(wanted, said := log.read_text().splitlines()):
            process = self._services[-1]
            if process.returncode is not None:
                return process.returncode or 1, said
            await asyncio.sleep(0.05)
        return 0, said

    async def _control(self, verb: str) -> tuple[int, list[str]]:
        if verb == "stop":
            process = self._unit_process
            code = 0 if process is None else await self._end(process)
            self._unit_process = None
            return code, []
        settings = unit_settings(self._unit)
        _, *arguments = settings["ExecStart"].split()
        file = self.path(settings["EnvironmentFile"])
        given = dict(re.findall(r"^(\w+)=(.*)$", file.read_text(), re.MULTILINE))
        await self._begin(["splitferry", *arguments], self._environment | given)
        self._unit_process = self._services.pop()
        return 0, []

    async def _begin(self, command: Sequence[str], environment: Mapping[str, str]) -> Path:
        self._logs += 1
        log = self.directory / f"service-{self._logs}.log"
        with log.open("wb") as output:
            self._services.append(
                await asyncio.create_subprocess_exec(
                    *command,
                    cwd=self.directory,
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            )
        return log

    async def _end(self, process: asyncio.subprocess.Process) -> int:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        return await process.wait()

    async def close(self) -> None:
        """Stop what runs, the last one first. Idempotent."""
        if self._shell is not None and self._shell.returncode is None:
            self._shell.kill()
            await self._shell.wait()
        running = [one for one in (*self._services, self._unit_process) if one is not None]
        self._services, self._unit_process = [], None
        for process in reversed(running):
            try:
                async with asyncio.timeout(BOUND):
                    self.codes.append(await self._end(process))
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()


@asynccontextmanager
async def console(
    directory: Path, environment: Mapping[str, str], unit: Path
) -> AsyncIterator[Console]:
    """A console whose services have all ended well at the end."""
    made = Console(directory, _outside() | dict(environment), unit)
    try:
        yield made
    except BaseException:
        for log in sorted(directory.glob("service-*.log")):
            print(f"{log.name}:", *log.read_text().splitlines()[-30:], sep="\n")
        raise
    finally:
        await made.close()
    assert not any(made.codes), made.codes


def _outside() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("SPLITFERRY_")}


def unit_settings(unit: Path) -> dict[str, str]:
    """The settings of a systemd unit, the last one of each name."""
    lines = (line.partition("=") for line in unit.read_text().splitlines() if "=" in line)
    return {name: value for name, _, value in lines if not name.startswith("#")}
