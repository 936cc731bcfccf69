from agent.trail import Kind, Subject, Subjects, Trail, one
from tests.support.builders import columns, key


def subjects(*numbers: int) -> Subjects:
    return columns(*(Subject(key(number), f"s{number}") for number in numbers))


def numbers(trail: Trail, after: int = 0, limit: int = 100) -> list[int]:
    return [occurrence.number for occurrence in trail.after(after, limit)]


def test_occurrences_are_numbered_from_one_in_their_order() -> None:
    trail = Trail()
    trail.add(1.0, Kind.GRANTED, 7, subjects(1, 2))
    trail.add(2.0, Kind.ENDED, 8, one(Subject(key(1), "s1", "idle", "no sign of life", "alice")))
    assert [(o.number, o.at, o.kind, o.revision, o.subject) for o in trail.after(0, 9)] == [
        (1, 1.0, Kind.GRANTED, 7, Subject(key(1), "s1")),
        (2, 1.0, Kind.GRANTED, 7, Subject(key(2), "s2")),
        (3, 2.0, Kind.ENDED, 8, Subject(key(1), "s1", "idle", "no sign of life", "alice")),
    ]


def test_each_of_one_moment_keeps_its_own_reason_and_detail() -> None:
    trail = Trail()
    told = [Subject(key(1), None, "drift", "a"), Subject(key(2), None, "guard", "b"), Subject("odd")]
    trail.add(1.0, Kind.DRIFT, None, columns(*told))
    assert [occurrence.subject for occurrence in trail.after(0, 9)] == told


def test_nothing_happening_is_no_occurrence() -> None:
    trail = Trail()
    trail.add(1.0, Kind.GRANTED, 7, Subjects(()))
    assert (trail.next, trail.oldest, trail.after(0, 9)) == (1, 1, [])
    assert not trail._moments


def test_a_reader_goes_on_where_it_was_also_within_a_moment() -> None:
    trail = Trail()
    trail.add(1.0, Kind.GRANTED, 7, subjects(*range(5)))
    trail.add(1.0, Kind.ENDED, 7, subjects(*range(5)))
    assert numbers(trail, 0, 3) == [1, 2, 3]
    assert numbers(trail, 3, 4) == [4, 5, 6, 7]
    assert numbers(trail, 7) == [8, 9, 10]
    assert numbers(trail, 10) == []


def test_the_oldest_go_and_as_many_as_there_is_room_for_stay() -> None:
    trail = Trail(room=10)
    for _ in range(20):
        trail.add(1.0, Kind.GRANTED, 7, subjects(1, 2, 3))
    kept = numbers(trail)
    assert kept[-1] == 60
    assert 10 <= len(kept) < 10 + 3
    assert trail.oldest == kept[0]


def test_more_at_once_than_there_is_room_for_stay_together_until_others_come() -> None:
    trail = Trail(room=10)
    trail.add(1.0, Kind.ENDED, 7, subjects(*range(50)))
    assert len(numbers(trail)) == 50
    trail.add(2.0, Kind.GRANTED, 7, subjects(*range(10)))
    assert numbers(trail) == list(range(51, 61))


def test_the_last_occurrences_of_one_peer_come_in_their_order() -> None:
    trail = Trail()
    for second in range(5):
        trail.add(float(second), Kind.GRANTED, second, subjects(1, 2))
        trail.add(float(second), Kind.ENDED, second, subjects(2))
    assert [(told.kind, told.revision) for told in trail.of(key(2), 3)] == [
        (Kind.ENDED, 3),
        (Kind.GRANTED, 4),
        (Kind.ENDED, 4),
    ]
    assert [told.revision for told in trail.of(key(1), 100)] == [0, 1, 2, 3, 4]
    assert trail.of(key(3), 100) == []


def test_what_fits_is_found_however_far_back_it_is() -> None:
    trail = Trail()
    trail.add(1.0, Kind.GRANTED, 1, subjects(1))
    for second in range(2000):
        trail.add(float(second), Kind.RENEWED, 2, subjects(2))
    assert [told.kind for told in trail.last(50, lambda subject: subject.peer == key(1))] == [Kind.GRANTED]
    assert [told.number for told in trail.last(2, lambda _: True)] == [2000, 2001]
    trail.add(1.0, Kind.ENDED, 3, subjects(3, 4, 5, 6))
    for limit in (1, 2, 3, 4, 5):
        last = [told.number for told in trail.last(limit, lambda _: True)]
        assert last == list(range(2006 - limit, 2006))
