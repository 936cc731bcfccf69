"""The clauses of the core API that a core can be held to, in the order in which they are shown."""

from __future__ import annotations

from typing import Final, NamedTuple


class Clause(NamedTuple):
    """``id`` names it for good, ``text`` is what the API says, ``remedy`` what to do in a core that fails."""

    id: str
    text: str
    remedy: str


class Section(NamedTuple):
    """Clauses that are about one thing."""

    title: str
    clauses: tuple[Clause, ...]


_CONNECTION = Section(
    "Connection and token",
    (
        Clause(
            "connection.reachable",
            "Core answers over HTTPS that this host trusts; plain http only to loopback or a unix socket.",
            "GET state with the gateway's token has to be answered with 200",
        ),
        Clause(
            "connection.no-redirects",
            "Redirects are not followed.",
            "answer at the address itself, and have core.url name it",
        ),
        Clause(
            "auth.missing-token",
            "A request without a token is refused with 401 or 403, whatever it asks for.",
            "check the token before anything else, on every path",
        ),
        Clause(
            "auth.wrong-token",
            "A request with a token that core never gave is refused with 401 or 403.",
            "compare the whole token, not a part of it",
        ),
    ),
)

_STATE = Section(
    "State",
    (
        Clause(
            "state.json",
            "GET state is 200 with one JSON object, as application/json.",
            "send the object of the API with Content-Type: application/json",
        ),
        Clause(
            "state.epoch", "epoch is 1 to 64 of A-Z a-z 0-9 _ -.", "give the epoch a shorter, plainer name"
        ),
        Clause(
            "state.revision",
            "revision is an integer from 0 to 2^63-1.",
            "count revisions as integers, and send them as JSON numbers",
        ),
        Clause(
            "state.etag",
            'A state has the ETag "EPOCH:REVISION", weak or not.',
            "make the ETag of the very epoch and revision that stand in the body",
        ),
        Clause(
            "state.not-modified",
            "304 without a body when If-None-Match names the current state, compared weakly.",
            'strip W/ from each tag of If-None-Match before comparing it with "EPOCH:REVISION"',
        ),
        Clause(
            "state.modified",
            "200 with the whole state when If-None-Match names another.",
            "compare the tag whole: another revision and another epoch are other states",
        ),
        Clause(
            "state.server-time",
            "server_time is core's time in UTC (here: within 5 minutes of this host's).",
            "stamp each answer with the time at which it is made, in UTC; keep both hosts' clocks by NTP",
        ),
        Clause(
            "state.server-time-runs",
            "server_time is that of the request: it runs as time does, also while the state stays the same.",
            "do not keep server_time with a stored answer: deadlines are reckoned from it",
        ),
        Clause(
            "state.location",
            "location has an id of 1 to 128 printable characters and mfa_required, a boolean.",
            "send location.id as a string and location.mfa_required as true or false",
        ),
        Clause(
            "state.interface",
            "interface, if there, has addresses, listen_port, mtu and fwmark within their limits.",
            "leave out what core has no opinion on",
        ),
        Clause(
            "state.session-policy",
            "session_policy, if there, has numbers of seconds of at least 1, and liveness gateway or core.",
            "leave out what core has no opinion on",
        ),
        Clause(
            "state.peer-count",
            "peer_count is required and equals the length of peers.",
            "count the list that is sent, after it was made",
        ),
        Clause(
            "state.peers",
            "Each entry of peers has what the API requires, in its types.",
            "see components/schemas/Peer in docs/core-api.openapi.yaml",
        ),
        Clause(
            "state.sessions",
            "A session has id, preshared_key, granted_at and expires_at; it ends after it was granted.",
            "see components/schemas/Session in docs/core-api.openapi.yaml",
        ),
        Clause(
            "state.one-entry",
            "A public key is listed once.",
            "all entries of a repeated key are refused: list each device once",
        ),
        Clause(
            "state.one-owner",
            "A prefix belongs to one peer; of peers that do MFA none contains another's prefix.",
            "all claimants of a prefix are refused: give each device addresses of its own",
        ),
        Clause(
            "state.never-back",
            "Within an epoch the revision never goes back.",
            "store the revision with what it counts, in one transaction",
        ),
        Clause(
            "state.gzip",
            "An answer is packed with gzip or not at all, and whole.",
            "use no other Content-Encoding than gzip, and that only for who accepts it",
        ),
        Clause(
            "state.readable",
            "The agent's own reader takes the state.",
            "see docs/core-api.openapi.yaml",
        ),
    ),
)

_FORMS = Section(
    "Keys, prefixes, times and JSON",
    (
        Clause(
            "keys.canonical",
            "Public keys are exactly 44 characters of base64 that encode back to themselves, not all zero.",
            "write 32 bytes in standard base64 with padding, and check what users enter in the same way",
        ),
        Clause(
            "keys.preshared",
            "PSKs are such keys as well, and never all zero.",
            "an all-zero PSK means none to WireGuard: make one of 32 random bytes",
        ),
        Clause(
            "prefixes.strict",
            "Prefixes are CIDR without host bits, zone or IPv4-mapped addresses.",
            "write the network's address: 10.8.0.0/24, not 10.8.0.1/24",
        ),
        Clause(
            "times.offset",
            "Times are RFC 3339 and carry an offset.",
            "write times in UTC with a Z: 2026-11-24T03:00:00.000Z",
        ),
        Clause("json.no-repeated-keys", "No object repeats a key.", "write each member of an object once"),
    ),
)

_STREAM = Section(
    "Stream",
    (
        Clause(
            "stream.opens",
            "GET changes is 200 and text/event-stream (404, 405, 501: core has no stream).",
            "send the headers when the stream is opened, not with the first event",
        ),
        Clause(
            "stream.identity",
            "The stream is never compressed.",
            "leave this path out of compression, in core and in proxies before it",
        ),
        Clause(
            "stream.heartbeat",
            "A comment line at least every 15 s keeps the stream alive.",
            "send a line that begins with a colon every 10 s, and have proxies pass it on at once",
        ),
        Clause("stream.id-form", "Each event's id is EPOCH:REVISION.", "give each event an id"),
        Clause(
            "stream.revision-by-one",
            "Each event's revision is the one before plus one.",
            "one change, one revision, one event; the first event after Last-Event-ID is the next revision",
        ),
        Clause(
            "stream.epoch-stays",
            "Other than by GET state the epoch never changes.",
            "send resync when revisions start over",
        ),
        Clause(
            "stream.event-types",
            "An event is one of the API's.",
            "an unknown event costs the agent a pull of the whole state",
        ),
        Clause(
            "stream.data",
            "An event's data is the JSON of its type, in at most 1 MiB.",
            "see components/schemas/Change in docs/core-api.openapi.yaml",
        ),
        Clause(
            "stream.resume-current",
            "From the current revision nothing is replayed, and what comes next is the next revision.",
            "send what is newer than Last-Event-ID, and nothing else",
        ),
        Clause(
            "stream.resume",
            "From an older revision every event since is sent, as it was; or resync.",
            "keep a log of changes and read it from Last-Event-ID on, or answer with resync",
        ),
        Clause(
            "stream.resync-other-epoch",
            "From another epoch: resync.",
            "what can't be replayed is answered with resync, never with silence",
        ),
        Clause(
            "stream.resync-future",
            "From a revision that core does not have yet: resync.",
            "core has forgotten something, or is another: say resync",
        ),
        Clause(
            "stream.resync-carries-revision",
            "A resync's id is core's current EPOCH:REVISION.",
            "give resync the position from which the stream goes on",
        ),
        Clause(
            "stream.goes-on-after-resync",
            "resync is no revision, and the stream goes on: the next event is the revision after its id.",
            "keep the stream open after resync",
        ),
        Clause(
            "stream.complete",
            "What is in the state has been in an event.",
            "write the change and its event in one transaction, and wake open streams after it",
        ),
    ),
)

_CHANGES = Section(
    "Changes",
    (
        Clause(
            "change.peer-upserted",
            "peer_upserted has the peer whole, with its live session.",
            "an upsert without the session ends it",
        ),
        Clause(
            "change.session-granted", "session_granted begins a session.", "send it with the whole session"
        ),
        Clause(
            "change.session-renewed",
            "The same id again renews: expires_at or PSK may change, granted_at may not.",
            "keep the id and granted_at of a session that is renewed",
        ),
        Clause(
            "change.session-replaced",
            "Another id replaces the live session, by session_granted alone.",
            "do not revoke the old one before: in place, no packet is lost",
        ),
        Clause(
            "change.session-revoked",
            "session_revoked names the peer and its live session.",
            "a session_revoked with another id has no effect",
        ),
        Clause(
            "change.prefix-moves",
            "A prefix that moves from one peer to another is sent as its old owner's upsert first.",
            "take it from the old owner in one revision and give it to the new one in the next",
        ),
        Clause(
            "change.location-changed",
            "location_changed has location, interface and session_policy, each whole.",
            "send what stays the same as well",
        ),
        Clause("change.peer-removed", "peer_removed names the peer.", "send it with the public key"),
        Clause(
            "change.known-peer",
            "An event is about a peer that is listed.",
            "send peer_upserted before anything else about a peer",
        ),
        Clause(
            "change.snapshot-agrees",
            "The events since an earlier state make the later state of it.",
            "make both of the same data; a state that changes has another revision",
        ),
        Clause(
            "session.granted-at-stays",
            "granted_at never changes for a session's id.",
            "the agent counts max_lifetime from it: write it once",
        ),
        Clause(
            "session.id-is-new",
            "A session that has ended never lives again, and an id is never given to two peers.",
            "make a new id for each session",
        ),
        Clause(
            "session.psk-is-fresh",
            "Each session has a PSK of its own.",
            "make 32 random bytes for each session",
        ),
        Clause(
            "restart.continues",
            "A core that keeps its data over a restart goes on with its epoch and revisions.",
            "store epoch and revision; where revisions may have been lost, take a new epoch",
        ),
        Clause(
            "restart.new-epoch",
            "The epoch changes whenever revisions start over.",
            "make a random epoch whenever a database is made or restored",
        ),
    ),
)

_REPORTS = Section(
    "Reports",
    (
        Clause("applied.accepted", "POST applied: 202.", "take it, and answer 202"),
        Clause(
            "applied.repeated",
            "applied is sent after every pull, also of a revision that was applied before: 202.",
            "take it again",
        ),
        Clause(
            "applied.refused",
            "refused lists who is not admitted, as core wrote the key, also where it is none: 202.",
            "take public_key in refused for text",
        ),
        Clause("stats.accepted", "POST stats: 202.", "take it, and answer 202"),
        Clause(
            "stats.unknown-peer",
            "A report may cross with a peer's removal: 202.",
            "skip peers that core does not know (any more)",
        ),
        Clause("stats.gzip", "Reports above 8 KiB come in gzip: 202.", "unpack Content-Encoding: gzip"),
        Clause(
            "ends.accepted",
            "POST session-ends: 202, also for a session that core knows nothing of.",
            "take what is unknown as well: the agent sends ends again until they are acknowledged",
        ),
        Clause(
            "ends.idempotent",
            "The same ends again: 202.",
            "know them by session_id; what is stored already changes nothing",
        ),
        Clause("ends.gzip", "Ends above 8 KiB come in gzip: 202.", "unpack Content-Encoding: gzip"),
        Clause(
            "ends.taken",
            "A session that the gateway has ended is listed no more.",
            "end it in core as well: the agent refuses it for good",
        ),
        Clause(
            "reports.unknown-fields-ignored",
            "Members that core does not know are ignored: 202.",
            "a newer agent may send more",
        ),
    ),
)

_ERRORS = Section(
    "Errors and strictness",
    (
        Clause(
            "errors.unknown-path",
            "A path that the API does not have is refused with 4xx or 501, best 404.",
            "no catch-all: a wrong core.url has to be seen as such",
        ),
        Clause(
            "errors.method",
            "A method that a path does not have is refused with 4xx or 501, best 405.",
            "take GET for state and changes, POST for the others",
        ),
        Clause(
            "json.malformed-request",
            "A body that is not JSON, not whole or of other types is refused with 4xx.",
            "answer 400; the agent must never take a report for delivered that was not read",
        ),
        Clause(
            "json.repeated-key-refused",
            "A body in which an object repeats a key is malformed: 4xx.",
            "parsers differ in which value they take: refuse it",
        ),
        Clause(
            "times.offset-required",
            "A time without an offset is malformed: 4xx.",
            "read times strictly, as RFC 3339",
        ),
        Clause(
            "keys.canonical-required",
            "A key that does not encode back to itself is malformed: 4xx.",
            "decode and encode keys, and compare",
        ),
        Clause(
            "errors.goes-on",
            "A bad request has no effect on those after it.",
            "an exception in one request must not end the process or leave a lock behind",
        ),
    ),
)

SECTIONS: Final = (_CONNECTION, _STATE, _FORMS, _STREAM, _CHANGES, _REPORTS, _ERRORS)
CLAUSES: Final = {clause.id: clause for section in SECTIONS for clause in section.clauses}
