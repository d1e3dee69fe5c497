"""The control channel of a run of several processes: roll call, signs of life, a word at the end.

Process 0 listens and every other process keeps one TCP connection to it, on which both say each
second what they do. JAX's coordination service could tell that something is wrong, but not which
process did not come, hangs or died, and then aborts: this ends a run with one line that does.
"""

import collections
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from latent_diffusion_jax.cluster.place import Place
from latent_diffusion_jax.errors import UserError

TICK = 1.0  # seconds between signs of life
STALL, LOST = 60.0, 180.0  # seconds without one before a warning, and before the run ends
LONGEST = 1 << 16  # bytes of one message
WAIT_FOR_BLAME = 10.0  # seconds that a broken collective waits for the channel to say whose fault

Say = Callable[[str], None]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end(line: str, code: int) -> None:
    """Ends this process at once: its main thread may hang in a collective for ever."""
    _warn(line)
    sys.stdout.flush()
    os._exit(code)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on port {port}: {error.strerror}") from None


class _Lines:
    """A non-blocking socket that carries JSON, one object a line."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._received = b""
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """What does not go through is lost: the peer is gone, or has not read for minutes."""
        with contextlib.suppress(OSError), self._sending:
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when the peer has closed, or talks nonsense."""
        try:
            data = self.connection.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(each, dict) for each in messages) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()


class _Member:
    """What is known of another process."""

    def __init__(self, lines: _Lines, host: str, now: float):
        self.lines, self.host = lines, host
        self.heard = now
        self.step, self.doing = -1, "starting"
        self.silent = False


class Channel:
    """One end of the channel; `join` makes it, the training loop reports to it.

    Args:
      place: of this process.
      stall, lost: seconds without a sign of life before a warning, and before the run ends.
      warn: takes a line.
      end: takes the last line and an exit code, and ends the process.
    """

    def __init__(
        self,
        place: Place,
        *,
        stall: float = STALL,
        lost: float = LOST,
        warn: Say = _warn,
        end: Callable[[str, int], None] = _end,
    ):
        self.place = place
        self.stall, self.lost = stall, lost
        self._warn, self._end = warn, end
        self._step, self._doing = -1, "starting"
        self._members: dict[int, _Member] = {}
        self._listener: socket.socket | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._progressed, self._stuck = time.monotonic(), False
        self._ballot = 0
        self._votes: dict[int, dict[int, bool]] = collections.defaultdict(dict)
        self._voted = threading.Condition()

    # -- the roll call

    def roll_call(self, timeout: float) -> None:
        """Waits until all processes have come.

        Raises:
          UserError: not all of them within `timeout` seconds: says which came and which did not.
        """
        answer = self._call_all if self.place.process == 0 else self._report
        answer(time.monotonic() + timeout, timeout)
        self._progressed = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="cluster", daemon=True)
        self._thread.start()

    def _call_all(self, deadline: float, timeout: float) -> None:
        port = int(self.place.coordinator.rpartition(":")[2])
        _listen(port + 1).close()  # JAX's service crashes where its port is taken
        self._listener = _listen(port)
        waiting: list[_Lines] = []
        while len(self._members) < self.place.processes - 1:
            if time.monotonic() > deadline:
                why = self._absent(timeout)
                self._leave({"end": why})
                raise UserError(why)
            self._listener.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                waiting.append(_Lines(self._listener.accept()[0]))
            for lines in waiting[:]:
                messages = lines.receive()
                if messages == []:
                    continue
                waiting.remove(lines)
                self._admit(lines, (messages or [{}])[0])
        for member in self._members.values():
            member.lines.send({"go": True})

    def _admit(self, lines: _Lines, hello: dict[str, Any]) -> None:
        """Takes one that introduced itself; strangers are shown out."""
        number, processes = hello.get("process"), hello.get("processes")
        if not isinstance(number, int) or not isinstance(processes, int):
            lines.close()
            return
        wrong = ""
        if processes != self.place.processes:
            wrong = f"process {number} was started as one of {processes} processes"
        elif not 0 < number < processes:
            wrong = f"a process {number} cannot join"
        elif number in self._members:
            wrong = f"process {number} was started twice"
        if wrong:
            wrong = f"{wrong}, here there are {self.place.processes}"
            lines.send({"end": wrong})
            lines.close()
            self._warn(f"warning: refused: {wrong}")
            return
        self._members[number] = _Member(lines, str(hello.get("host", "")), time.monotonic())

    def _absent(self, timeout: float) -> str:
        absent = [i for i in range(1, self.place.processes) if i not in self._members]
        shown = ", ".join(self.place.name(i) for i in absent[:20])
        more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
        came = len(self._members) + 1
        return (
            f"{shown}{more} did not come within {timeout:g} s ({came} of {self.place.processes} are"
            f" here): are they running, with {self.place.coordinator} as coordinator?"
        )

    def _report(self, deadline: float, timeout: float) -> None:
        host, _, port = self.place.coordinator.rpartition(":")
        hello = {
            "process": self.place.process,
            "processes": self.place.processes,
            "host": socket.gethostname(),
        }
        lines: _Lines | None = None
        why = "no answer"
        while time.monotonic() < deadline:
            if lines is None:
                try:
                    lines = _Lines(socket.create_connection((host.strip("[]"), int(port)), 5))
                    lines.send(hello)
                except OSError as error:
                    why = error.strerror or str(error)
                    time.sleep(0.2)
                    continue
            messages = lines.receive()
            if messages is None:  # another listened there, or process 0 ended: it may come again
                lines.close()
                lines, why = None, "it closed the connection"
                time.sleep(0.2)
            elif messages and "end" in messages[0]:
                lines.close()
                raise UserError(str(messages[0]["end"]))
            elif messages and "go" in messages[0]:
                self._members[0] = _Member(lines, host, time.monotonic())
                return
            else:
                why = "it is still waiting for others"
                time.sleep(0.02)
        raise UserError(
            f"{self.place.name(self.place.process)} could not join {self.place.coordinator}"
            f" (process 0) within {timeout:g} s: {why}"
        )

    # -- while the run goes on

    def at(self, step: int, doing: str) -> None:
        """What the main thread does now; sent with the next sign of life."""
        self._step, self._doing = step, doing
        self._progressed, self._stuck = time.monotonic(), False

    def everywhere(self, ok: bool) -> bool:
        """Whether `ok` holds in every process; waits for all of them, however long they take.

        All call this equally often, from their main threads.
        """
        self._ballot += 1
        vote: dict[str, Any] = {"ballot": self._ballot, "ok": ok}
        needed = set(range(1, self.place.processes)) if self.place.process == 0 else {0}
        if self.place.process:
            self._members[0].lines.send(vote)
        with self._voted:
            self._voted.wait_for(lambda: needed <= self._votes[self._ballot].keys())
            others = all(self._votes.pop(self._ballot).values())
        if self.place.process:
            return others  # what process 0 found, this one included
        for member in list(self._members.values()):
            member.lines.send({**vote, "ok": ok and others})
        return ok and others

    def blame(self) -> None:
        """Waits a little: where another process is the reason, the channel ends this one."""
        time.sleep(WAIT_FOR_BLAME)

    def fail(self, line: str, code: int) -> None:
        """Ends this process, and with it the run, with a line that all of them print."""
        self._leave({"end": line, "code": code})
        self._end(line, code)

    def close(self) -> None:
        """Says that this process is done."""
        self._leave({"bye": True})

    def _leave(self, word: dict[str, Any]) -> None:
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * TICK)
        for member in self._members.values():
            member.lines.send(word)
            # Unread messages would turn the close into a reset, and the word might be lost.
            with contextlib.suppress(OSError):
                member.lines.connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + 0.5
        while self._members and time.monotonic() < until:
            for number, member in list(self._members.items()):
                if member.lines.receive() is None:
                    del self._members[number]
            time.sleep(0.01)
        for member in self._members.values():
            member.lines.close()
        if self._listener is not None:
            self._listener.close()

    def _watch(self) -> None:
        last = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for number, member in self._members.items():
                selector.register(member.lines.connection, selectors.EVENT_READ, number)
            while not self._closing.is_set():
                for key, _ in selector.select(timeout=TICK):
                    member = self._members[key.data]
                    if not self._listen(key.data, member):
                        selector.unregister(member.lines.connection)
                        member.lines.close()
                        del self._members[key.data]
                now = time.monotonic()
                if now - last < TICK:
                    continue
                if now - last > 5 * TICK:  # this process was stopped itself: the others were not
                    for member in self._members.values():
                        member.heard = now
                last = now
                for member in self._members.values():
                    member.lines.send({"step": self._step, "doing": self._doing})
                self._judge(now)

    def _listen(self, number: int, member: _Member) -> bool:
        """Reads what came; whether the member is still there."""
        messages = member.lines.receive()
        name = self._name(number)
        if messages is None:
            self._end_all(f"{name} died at step {max(member.step, 0)} ({member.doing})", 1)
            return False
        now = time.monotonic()
        for message in messages:
            if "bye" in message:
                return False
            if "end" in message:
                line, code = str(message["end"]), int(message.get("code", 1))
                self._end_all(line if number == 0 else f"{name}: {line}", code)
                return False
            if "ballot" in message:
                with self._voted:
                    self._votes[message["ballot"]][number] = message["ok"]
                    self._voted.notify_all()
            if "step" in message:
                if message["step"] > member.step or message["doing"] != member.doing:
                    self._progressed, self._stuck = now, False
                member.step, member.doing = message["step"], message["doing"]
        if messages and member.silent:
            self._warn(f"{name} is back after {now - member.heard:.0f} s")
            member.silent = False
        if messages:
            member.heard = now
        return True

    def _name(self, number: int) -> str:
        named = self.place.name(number)
        host = self._members[number].host
        return named if "(" in named or not host else f"{named} ({host})"

    def _judge(self, now: float) -> None:
        for number, member in list(self._members.items()):
            silence = now - member.heard
            if silence > self.lost:
                self._end_all(f"no sign of life from {self._name(number)} for {silence:.0f} s", 1)
            elif silence > self.stall and not member.silent:
                member.silent = True
                self._warn(
                    f"warning: no sign of life from {self._name(number)} for {silence:.0f} s, last"
                    f" at step {max(member.step, 0)} ({member.doing}); the run ends at"
                    f" {self.lost:.0f} s"
                )
        if self.place.process or self._stuck or any(m.silent for m in self._members.values()):
            return
        states = {0: (self._step, self._doing)}
        states |= {number: (m.step, m.doing) for number, m in self._members.items()}
        # Who computes waits for the others' devices; else all may well compile, or draw pictures.
        waits = any(doing == "compute" for _, doing in states.values())
        if waits and now - self._progressed > self.stall:
            self._stuck = True
            self._warn(
                f"warning: no step for {now - self._progressed:.0f} s: {self._behind(states)}"
            )

    def _behind(self, states: dict[int, tuple[int, str]]) -> str:
        """Who keeps the others waiting: the lowest step, and of them those that do not compute."""
        lowest = min(step for step, _ in states.values())
        late = {n: doing for n, (step, doing) in states.items() if step == lowest}
        shown = {n: doing for n, doing in late.items() if doing != "compute"} or late
        if len(shown) == len(states):
            return f"all are at step {lowest} (compute)"
        names = [
            f"{self._name(n) if n else self.place.name(0)} is at step {lowest} ({doing})"
            for n, doing in list(shown.items())[:20]
        ]
        return f"{', '.join(names)}; the others wait"

    def _end_all(self, line: str, code: int) -> None:
        line = line if "error:" in line else f"error: {line}: run the same command again to resume"
        if self.place.process == 0:
            self._leave({"end": line, "code": code})
        self._closing.set()
        self._end(line, code)
