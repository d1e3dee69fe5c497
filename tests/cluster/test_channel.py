"""The control channel among threads of this process, each of which plays a process."""

import json
import socket
import threading
import time

import pytest

from latent_diffusion_jax.cluster.channel import Channel
from latent_diffusion_jax.cluster.place import Place
from latent_diffusion_jax.errors import UserError


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Ended(Exception):
    """Stands for the end of a process."""


class Player:
    """One process: what its channel said, and with which line and code it ended."""

    def __init__(self, process, processes, port, hosts=(), **options):
        self.said, self.ended = [], threading.Event()
        self.last = None
        self.channel = Channel(
            Place(f"127.0.0.1:{port}", processes, process, "test", hosts),
            warn=self.said.append,
            end=self.end,
            **options,
        )

    def end(self, line, code):
        self.last = line, code
        self.ended.set()
        raise Ended

    def vanish(self):
        """As a process that was killed: its sockets close, nothing is said."""
        self.channel._closing.set()
        self.channel._thread.join()
        for member in self.channel._members.values():
            member.lines.close()

    def freeze(self):
        """As a process that was stopped: silent, its sockets open."""
        self.channel._closing.set()
        self.channel._thread.join()


@pytest.fixture(autouse=True)
def quiet_ends(monkeypatch):
    hook = threading.excepthook
    monkeypatch.setattr(threading, "excepthook", lambda args: args.exc_type is Ended or hook(args))


@pytest.fixture
def players():
    """Makes a number of processes that have answered the roll call."""
    made = []

    def make(number, hosts=(), **options):
        port = free_port()
        made.extend(Player(i, number, port, hosts, **options) for i in range(number))
        calls = [threading.Thread(target=p.channel.roll_call, args=(20,)) for p in made]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        return made

    yield make
    for player in made:
        player.channel.close()


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_death_ends_all_others_at_once(players):
    zero, one, two = players(3, hosts=("a", "b", "c"))
    two.channel.at(12, "data")
    wait_for(lambda: zero.channel._members[2].step == 12)
    began = time.monotonic()
    two.vanish()
    assert zero.ended.wait(10)
    assert one.ended.wait(10)
    assert time.monotonic() - began < 5
    line = "error: process 2 (c) died at step 12 (data): run the same command again to resume"
    assert zero.last == one.last == (line, 1)


def test_the_death_of_the_first_is_noticed_too(players):
    zero, one, _ = players(3)
    zero.vanish()
    assert one.ended.wait(10)
    assert one.last[0].startswith("error: process 0 (127.0.0.1) died at step 0 (starting)")


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_is_told_to_all(players, who):
    everyone = players(3)
    with pytest.raises(Ended):
        everyone[who].channel.fail("error: no such folder", 2)
    for other in everyone:
        assert other.ended.wait(10)
        line, code = other.last
        assert line.endswith("error: no such folder")
        assert code == 2
        if who and other is not everyone[who]:
            assert line.startswith(f"process {who} ({socket.gethostname()}): ")


def test_who_is_done_has_not_died(players):
    zero, one, two = players(3)
    one.channel.close()
    wait_for(lambda: 1 not in zero.channel._members)
    zero.channel.close()
    wait_for(lambda: 0 not in two.channel._members)
    assert not any(p.last or p.said for p in (zero, one, two))


def test_all_agree_or_none(players):
    everyone = players(3)
    ballots = [(True, True, True), (True, False, True), (False, True, True), (True, True, True)]
    results = {player.channel.place.process: [] for player in everyone}

    def vote(player, number):
        for n, ballot in enumerate(ballots):
            time.sleep(0.05 * ((number + n) % 3))
            results[number].append(player.channel.everywhere(ballot[number]))

    threads = [threading.Thread(target=vote, args=(p, i)) for i, p in enumerate(everyone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(found == [True, False, False, True] for found in results.values())


def test_silence_is_warned_of_and_ends_the_run(players):
    zero, one, two = players(3, hosts=("a", "b", "c"), stall=4, lost=10)
    two.freeze()
    wait_for(lambda: zero.said)
    assert "no sign of life from process 2 (c) for 4 s, last at step 0 (starting)" in zero.said[0]
    assert not zero.ended.is_set()
    assert zero.ended.wait(10)
    assert one.ended.wait(10)
    assert one.last[0].startswith("error: no sign of life from process 2 (c) for 10 s")


def test_who_comes_back_in_time_goes_on(players):
    zero, one = players(2, stall=4, lost=60)
    one.freeze()
    wait_for(lambda: zero.said)
    one.channel._members[0].lines.send({"step": 3, "doing": "compute"})
    wait_for(lambda: len(zero.said) == 2)
    assert "process 1" in zero.said[1]
    assert "is back after" in zero.said[1]
    assert not zero.ended.is_set()


def test_a_stall_names_who_is_late(players):
    everyone = players(3, hosts=("a", "b", "c"), stall=3)
    zero, one, two = everyone
    for player in everyone:
        player.channel.at(7, "evaluate")  # all together: nobody waits, whatever it takes
    time.sleep(5)
    assert not zero.said
    zero.channel.at(8, "compute")
    two.channel.at(8, "compute")
    one.channel.at(8, "data")
    wait_for(lambda: zero.said)
    assert "no step for 3 s: process 1 (b) is at step 8 (data); the others wait" in zero.said[0]
    one.channel.at(9, "compute")
    time.sleep(1.5)
    assert len(zero.said) == 1


def test_who_did_not_come_is_named():
    port = free_port()
    zero = Player(0, 4, port, ("a", "b", "c", "d"))
    one = Player(1, 4, port, ("a", "b", "c", "d"))
    said = []

    def call(player, seconds):
        with pytest.raises(UserError) as error:
            player.channel.roll_call(seconds)
        said.append(str(error.value))

    thread = threading.Thread(target=call, args=(one, 20))
    thread.start()
    call(zero, 1)
    thread.join()
    assert said[0] == said[1]
    assert said[0].startswith(
        "process 2 (c), process 3 (d) did not come within 1 s (2 of 4 are here)"
    )


def test_nobody_answers():
    one = Player(1, 2, free_port())
    with pytest.raises(UserError, match=r"could not join 127.0.0.1:\d+ .* 1 s: Connection refused"):
        one.channel.roll_call(1)


@pytest.mark.parametrize("beside", [0, 1])  # the channel's, and that of JAX's service
def test_a_port_is_taken(beside):
    with socket.create_server(("", 0)) as other:
        taken = other.getsockname()[1]
        zero = Player(0, 2, taken - beside)
        with pytest.raises(UserError, match=f"cannot listen on port {taken}: "):
            zero.channel.roll_call(1)


@pytest.mark.parametrize(
    ("number", "processes", "what"),
    [
        (2, 2, "process 2 was started as one of 2 processes"),
        (1, 4, "process 1 was started as one of 4"),
    ],
)
def test_processes_that_disagree(number, processes, what):
    port = free_port()
    zero, other = Player(0, 3, port), Player(1, 3, port)
    other.channel.place = Place(f"127.0.0.1:{port}", processes, number, "test")
    thread = threading.Thread(target=lambda: pytest.raises(UserError, zero.channel.roll_call, 2))
    thread.start()
    with pytest.raises(UserError, match="here there are 3"):
        other.channel.roll_call(5)
    thread.join()
    assert what in zero.said[0]
    zero.channel.close()


def test_strangers_do_not_matter():
    port = free_port()
    zero, one = Player(0, 2, port), Player(1, 2, port)
    thread = threading.Thread(target=zero.channel.roll_call, args=(20,))
    thread.start()
    strangers = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 70_000, b'[1]\n{"process": "x"}\n', b""):
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        strangers[-1].sendall(words)
    one.channel.roll_call(20)
    thread.join()
    zero.channel.at(1, "compute")
    wait_for(lambda: one.channel._members[0].step == 1)
    assert json.dumps(zero.said) == "[]"
    for stranger in strangers:
        stranger.close()
    zero.channel.close()
    one.channel.close()
