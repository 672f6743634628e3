"""Slots are never exceeded, and go to the slide with the least left to do."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from pipeline.archive.slots import FairSlots, Space


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 4))
def test_slots_are_bounded_and_go_to_the_slide_with_least_left(sizes: list[int], size: int) -> None:
    """Law: never more than `size` in flight, every block gets one; with one slot, slides end in order of size."""
    slots = FairSlots(size)
    flying, most, ended = 0, 0, []

    async def block() -> None:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0)
        flying -= 1

    async def slide(number: int, blocks: int) -> None:
        async with asyncio.TaskGroup() as group:
            for done in range(blocks):
                await slots.take(blocks - done)
                group.create_task(block()).add_done_callback(lambda _: slots.give_back())
        ended.append(number)

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            # somebody is at work when they all come
            await slots.take(0)
            for number, blocks in enumerate(sizes):
                group.create_task(slide(number, blocks))
            await asyncio.sleep(0)
            slots.give_back()

    asyncio.run(work())
    assert flying == 0
    assert most <= size
    assert sorted(ended) == list(range(len(sizes)))
    if size == 1:
        assert [sizes[i] for i in ended] == sorted(sizes)


def test_a_slot_that_is_cancelled_is_given_back() -> None:
    async def work() -> None:
        slots = FairSlots(1)
        await slots.take(1)
        waiting = [asyncio.create_task(slots.take(1)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        slots.give_back()  # goes to the second, which is cancelled before it wakes
        waiting[1].cancel()
        await asyncio.wait_for(waiting[2], 5)
        assert [w.cancelled() for w in waiting] == [True, True, False]

    asyncio.run(work())


def test_who_waits_gets_a_slot_that_is_new() -> None:
    """More workers have joined: nothing is given back for minutes, and the new ones must not wait so long."""

    async def work() -> None:
        slots = FairSlots(1)
        await slots.take(1)
        waiting = [asyncio.create_task(slots.take(1)) for _ in range(3)]
        await asyncio.sleep(0)
        slots.size = 3
        await asyncio.wait(waiting, timeout=0.1)
        assert [one.done() for one in waiting] == [True, True, False]
        slots.size = 1
        slots.give_back()
        slots.give_back()
        await asyncio.wait(waiting, timeout=0.1)
        assert not waiting[2].done()
        slots.give_back()
        await asyncio.wait_for(waiting[2], 5)

    asyncio.run(work())


def test_space_that_is_cancelled_is_given_back() -> None:
    async def work() -> None:
        space = Space(10)
        await space.take(10)
        first, second = asyncio.create_task(space.take(10)), asyncio.create_task(space.take(10))
        await asyncio.sleep(0)
        space.give_back(10)  # goes to the first, which is cancelled before it wakes
        first.cancel()
        await asyncio.wait_for(second, 5)
        assert first.cancelled()

    asyncio.run(work())


def test_who_waits_behind_a_cancelled_one_is_next() -> None:
    """Nothing is given back when a wait is cancelled, so that it must not be waited for."""

    async def work() -> None:
        space = Space(10)
        await space.take(8)
        large, small = asyncio.create_task(space.take(5)), asyncio.create_task(space.take(2))
        await asyncio.sleep(0)
        large.cancel()
        await asyncio.wait_for(small, timeout=1)

    asyncio.run(work())


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 3), st.booleans()), max_size=12))
def test_no_more_space_is_taken_than_there_is(asked: list[tuple[int, int, bool]]) -> None:
    """Law: whatever is asked for, given back or cancelled, at most `size` is taken, in order, and everyone gets it."""
    taken, order, cancelled = 0, list[int](), 0

    async def hold(space: Space, number: int, size: int, steps: int) -> None:
        nonlocal taken
        await space.take(size)
        order.append(number)
        taken += size
        try:
            assert taken <= 10
            for _ in range(steps):
                await asyncio.sleep(0)
        finally:
            taken -= size
            space.give_back(size)

    async def main() -> None:
        nonlocal cancelled
        space = Space(10)
        tasks = [asyncio.create_task(hold(space, n, size, steps)) for n, (size, steps, _) in enumerate(asked)]
        await asyncio.sleep(0)
        for task, (_, _, stop) in zip(tasks, asked, strict=True):
            cancelled += stop and task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(error is None or isinstance(error, asyncio.CancelledError) for error in ended)
        await asyncio.wait_for(space.take(10), timeout=1)  # all was given back

    asyncio.run(main())
    assert order == sorted(order)
    assert len(order) >= len(asked) - cancelled
