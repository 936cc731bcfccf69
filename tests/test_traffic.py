from hypothesis import given
from hypothesis import strategies as st

from agent.model import Endpoint
from agent.traffic import Traffic, TrafficBook
from tests.support.builders import key, observed

HOME = Endpoint(b"\xcb\x00\x71\x09", 51000)
AWAY = Endpoint(b"\xcb\x00\x71\x0a", 51000)


def totals(book: TrafficBook, number: int = 1) -> tuple[int, int]:
    traffic = book.get(key(number))
    return traffic.rx_bytes, traffic.tx_bytes


def test_a_peer_never_seen_has_no_traffic() -> None:
    assert TrafficBook().get(key(1)) == Traffic()


def test_counters_add_up_over_looks() -> None:
    book = TrafficBook()
    assert book.observe(observed(1, rx=100, tx=10)) == 100
    assert book.observe(observed(1, rx=150, tx=15)) == 50
    assert totals(book) == (150, 15)


def test_a_look_without_news_says_so() -> None:
    book = TrafficBook()
    assert book.observe(observed(1)) is None
    book.observe(observed(1, rx=1, handshake=5.0, endpoint=HOME))
    assert book.observe(observed(1, rx=1, handshake=5.0, endpoint=HOME)) is None
    assert book.observe(observed(1, rx=1, handshake=5.0, endpoint=AWAY)) == 0
    assert book.observe(observed(1, rx=1, handshake=6.0, endpoint=AWAY)) == 0


def test_rates_are_of_the_time_between_the_last_two_looks() -> None:
    book = TrafficBook()
    book.restore([(key(1), Traffic(1000, 100, 1000, 100))])
    book.look(50.0)
    book.observe(observed(1, rx=5000, tx=100))
    assert book.rates(key(1)) is None
    assert book.looked_at == 50.0

    book.look(60.0)
    book.observe(observed(1, rx=5500, tx=120))
    assert book.rates(key(1)) == (50.0, 2.0)
    assert book.rates(key(2)) == (0.0, 0.0)

    book.look(90.0)
    assert book.rates(key(1)) == (0.0, 0.0)


def test_the_rate_of_a_peer_added_afresh_is_not_negative() -> None:
    book = TrafficBook()
    book.look(0.0)
    book.observe(observed(1, rx=1000, tx=1000))
    book.added(key(1))
    book.look(10.0)
    book.observe(observed(1, rx=300, tx=20))
    assert book.rates(key(1)) == (30.0, 2.0)


def test_two_looks_at_once_or_in_the_wrong_order_have_no_rate() -> None:
    for again in (5.0, 4.0):
        book = TrafficBook()
        book.look(5.0)
        book.look(again)
        book.observe(observed(1, rx=300))
        assert book.rates(key(1)) is None


def test_counters_go_on_when_the_peer_is_added_afresh() -> None:
    book = TrafficBook()
    book.observe(observed(1, rx=100, tx=10))
    book.added(key(1))
    book.observe(observed(1, rx=300, tx=5))
    assert totals(book) == (400, 15)


def test_counters_go_on_also_of_who_was_only_sent_or_only_received_from() -> None:
    """A handshake that nobody answers grows one of them alone, and by the same again after an add."""
    for counted in (observed(1, rx=148), observed(1, tx=148)):
        book = TrafficBook()
        book.observe(counted)
        book.added(key(1))
        book.observe(counted)
        assert sum(totals(book)) == 296


def test_the_traffic_of_many_is_that_of_each_in_their_order() -> None:
    book = TrafficBook()
    book.observe(observed(1, rx=100))
    book.observe(observed(2, tx=7))
    assert book.many(key(n) for n in (2, 9, 1)) == [book.get(key(n)) for n in (2, 9, 1)]
    assert [one.rx_bytes for one in book.many([key(2), key(9), key(1)])] == [0, 0, 100]


def test_counters_go_on_when_somebody_else_has_added_the_peer_afresh() -> None:
    book = TrafficBook()
    book.observe(observed(1, rx=100, tx=10))
    assert book.observe(observed(1, rx=30, tx=5)) == 30
    assert totals(book) == (130, 15)


def test_counters_go_on_over_a_new_interface_and_a_restart() -> None:
    book = TrafficBook()
    book.observe(observed(1, rx=100, tx=10))
    book.observe(observed(2, rx=7))
    again = TrafficBook()
    again.restore((key(n), book.get(key(n))) for n in (1, 2))
    again.observe(observed(2, rx=7))
    again.interface_made()
    again.observe(observed(1, rx=100, tx=10))
    again.observe(observed(2, rx=8))
    assert (totals(again, 1), totals(again, 2)) == ((200, 20), (15, 0))


def test_the_last_handshake_and_endpoint_stay_when_the_peer_goes() -> None:
    book = TrafficBook()
    book.observe(observed(1, rx=1, handshake=5.0, endpoint=HOME))
    book.added(key(1))
    book.observe(observed(1, rx=2))
    assert (book.get(key(1)).latest_handshake, book.get(key(1)).endpoint) == (5.0, HOME)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000), st.integers(0, 1000)), max_size=30))
def test_totals_never_go_backwards_and_miss_nothing_that_a_look_could_see(
    steps: list[tuple[int, int, int]],
) -> None:
    book, rx, tx, true_rx, true_tx = TrafficBook(), 0, 0, 0, 0
    for kind, more_rx, more_tx in steps:
        if kind == 0:
            book.added(key(1))
            rx = tx = 0
        rx, tx = rx + more_rx, tx + more_tx
        true_rx, true_tx = true_rx + more_rx, true_tx + more_tx
        before = totals(book)
        book.observe(observed(1, rx=rx, tx=tx))
        assert totals(book) >= before
        assert totals(book) == (true_rx, true_tx)


def report(book: TrafficBook, number: int) -> None:
    held = book.get(key(number))
    book.reported(key(number), held.rx_bytes, held.tx_bytes, held.latest_handshake, held.endpoint)


def test_only_peers_that_changed_since_the_last_accepted_report_are_due() -> None:
    book = TrafficBook()
    listed = {key(1), key(2)}
    for number in (1, 2):
        book.observe(observed(number, rx=10))
    assert set(book.due(10, listed)) == listed
    report(book, 1)
    assert book.due(10, listed) == [key(2)]


def test_what_changed_under_a_report_is_due_again() -> None:
    book = TrafficBook()
    book.observe(observed(1, rx=10))
    for changed in (
        observed(1, rx=11),
        observed(1, rx=11, tx=1),
        observed(1, rx=11, tx=1, handshake=1.0),
        observed(1, rx=11, tx=1, handshake=1.0, endpoint=HOME),
    ):
        told = book.get(key(1))
        book.observe(changed)
        book.reported(key(1), told.rx_bytes, told.tx_bytes, told.latest_handshake, told.endpoint)
        assert book.due(10, {key(1)}) == [key(1)]
    report(book, 1)
    assert book.due(10, {key(1)}) == []


def test_a_report_holds_no_more_than_asked_for_and_only_listed_peers() -> None:
    book = TrafficBook()
    for number in (1, 2, 3, 4):
        book.observe(observed(number, rx=10))
    listed = {key(2), key(3), key(4)}
    assert book.due(2, listed) == [key(2), key(3)]
    assert book.due(9, listed) == [key(2), key(3), key(4)]


def test_after_a_new_epoch_everybody_who_was_seen_is_due() -> None:
    book = TrafficBook()
    book.restore([(key(3), Traffic()), (key(2), Traffic(5, 5))])
    book.observe(observed(1, rx=10))
    report(book, 1)
    book.report_all()
    assert set(book.due(9, {key(1), key(2), key(3)})) == {key(1), key(2)}


def test_what_no_traffic_reaches_is_not_believed() -> None:
    book = TrafficBook()
    book.observe(observed(1, rx=2**64 - 1, tx=2**64 - 1, handshake=1e15))
    assert totals(book) == (2**63 - 1, 2**63 - 1)
    assert book.get(key(1)).latest_handshake == 0.0
