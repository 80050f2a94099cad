"""How samples get to workers, with actors whose answers the test decides."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter.ray.dispatch import MAX_RETRIES, TIMEOUT_VARIABLE, Dispatcher, GenerationError  # noqa: E402
from kvrouter.ray.engine.base import SampleRequest, SampleResult  # noqa: E402
from kvrouter.ray.health import FleetHealth  # noqa: E402
from kvrouter.ray.router_handle import Choice  # noqa: E402


class Reference:
    def __init__(self, outcome):
        self._future = Future()
        if isinstance(outcome, BaseException):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)

    def future(self):
        return self._future


class Actor:
    """Answers with its number, or with an error while ``error`` is set."""

    def __init__(self, number):
        self.number = number
        self.error = None
        self.seen = []
        self.generate_sample = self

    def remote(self, request):
        self.seen.append((int(request.tokens[0]), request.decision))
        tokens = np.asarray([self.number])
        return Reference(self.error or SampleResult(tokens, np.zeros(1, np.float32), True, 0))


class Fleet:
    def __init__(self, size):
        self.actors = [Actor(number) for number in range(size)]
        self.health = FleetHealth(size)
        self.lost = []

        def lost(worker):
            self.lost.append(worker)
            self.health.mark_down(worker)

        self.done = []
        self.dispatcher = Dispatcher(self.actors, self.health, lost, self.note_done)

    def note_done(self, request, choice, answer):
        self.done.append((choice.ticket, None if answer is None else answer.worker))

    async def run(self, workers, **options):
        requests = [SampleRequest(np.asarray([number])) for number in range(len(workers))]
        answers = self.dispatcher.run(
            requests, [Choice(worker, 3, 10 + number) for number, worker in enumerate(workers)], **options
        )
        return {answer.index: answer async for answer in answers}


def gone():
    return ray.exceptions.ActorDiedError()


async def test_each_sample_goes_to_its_worker():
    fleet = Fleet(3)
    answers = await fleet.run([2, 0, 2, 1], wait_s=0.25)
    assert [answers[index].worker for index in range(4)] == [2, 0, 2, 1]
    assert answers[0].note.overlap_blocks == 3
    assert answers[0].note.wait_s == 0.25
    assert [number for number, _ in fleet.actors[2].seen] == [0, 2]
    assert sorted(fleet.done) == [(10, 2), (11, 0), (12, 2), (13, 1)]


async def test_samples_of_a_lost_worker_go_to_the_others():
    fleet = Fleet(3)
    fleet.actors[1].error = gone()
    answers = await fleet.run([1] * 6)
    assert sorted(answers) == list(range(6))
    workers = [answer.worker for answer in answers.values()]
    assert sorted(workers) == [0, 0, 0, 2, 2, 2]  # shared among them
    assert set(fleet.lost) == {1}
    assert sorted(ticket for ticket, _ in fleet.done) == list(range(10, 16))
    assert {worker for _, worker in fleet.done} == {0, 2}
    notes = [answer.note for answer in answers.values()]
    assert {(note.retries, note.overlap_blocks) for note in notes} == {(1, None)}


async def test_a_worker_known_to_be_down_is_not_tried():
    fleet = Fleet(2)
    fleet.health.mark_down(0)
    answers = await fleet.run([0, 0])
    assert {answer.worker for answer in answers.values()} == {1}
    assert not fleet.actors[0].seen
    assert answers[0].note.overlap_blocks is None  # it was that of worker 0


async def test_a_sample_that_ends_every_worker_is_given_up():
    fleet = Fleet(2)
    for actor in fleet.actors:
        actor.error = gone()

    def back_at_once(worker):
        fleet.lost.append(worker)

    fleet.dispatcher = Dispatcher(fleet.actors, fleet.health, back_at_once, fleet.note_done)
    with pytest.raises(GenerationError, match=f"sample 0 was lost with {MAX_RETRIES + 1} workers"):
        await fleet.run([0])
    assert len(fleet.lost) == MAX_RETRIES + 1
    assert fleet.done == [(10, None)]


async def test_no_worker_within_the_timeout(monkeypatch):
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.05")
    fleet = Fleet(2)
    fleet.health.mark_down(0)
    fleet.health.mark_down(1)
    with pytest.raises(GenerationError, match=f"raise {TIMEOUT_VARIABLE}"):
        await fleet.run([0])


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
async def test_a_timeout_that_is_none(monkeypatch, text):
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    with pytest.raises(ValueError, match=TIMEOUT_VARIABLE):
        await Fleet(1).run([0])


async def test_an_error_of_the_request_is_not_the_workers():
    fleet = Fleet(2)
    refused = ray.exceptions.RayTaskError("generate_sample", "traceback", ValueError("too long"))
    fleet.actors[0].error = refused.as_instanceof_cause()
    with pytest.raises(ValueError, match="too long"):
        await fleet.run([0, 1])
    assert not fleet.lost
