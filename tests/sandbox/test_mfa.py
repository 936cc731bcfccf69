import httpx

from tests.sandbox.parts import run, scene, served_scene


def refused(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]) == (status, code)
    assert response.json()["message"].endswith(".")


def test_the_right_totp_code_admits_once_the_gateway_has_confirmed() -> None:
    async def main() -> None:
        async with served_scene() as s:
            session = await s.connect()
            [peer] = (await s.gateway.state())["peers"]
            assert peer["session"] == session

    run(main())


def test_a_wrong_code_is_refused_and_grants_nothing() -> None:
    async def main() -> None:
        async with served_scene() as s:
            token = await s.token()
            refused(await s.finish(token, s.wrong_code()), 401, "wrong_code")
            assert await s.service.admin.sessions() == []
            assert (await s.finish(token, s.code())).status_code == 200

    run(main())


def test_a_totp_code_works_once_even_for_a_new_authentication() -> None:
    async def main() -> None:
        async with served_scene() as s:
            code = s.code()
            token = await s.token()
            assert (await s.finish(token, code)).status_code == 200
            refused(await s.finish(token, code), 401, "code_reused")
            refused(await s.finish(await s.token(), code), 401, "code_reused")
            s.clock.advance(30)
            refused(await s.finish(await s.token(), code), 401, "code_reused")
            assert (await s.finish(await s.token(), s.code())).status_code == 200

    run(main())


def test_a_totp_code_of_an_earlier_step_than_the_last_used_one_is_refused() -> None:
    async def main() -> None:
        async with served_scene() as s:
            earlier = s.code()
            s.clock.advance(30)
            await s.connect()
            refused(await s.finish(await s.token(), earlier), 401, "code_reused")

    run(main())


def test_a_totp_replay_is_refused_after_a_restart_of_core() -> None:
    async def main() -> None:
        async with scene(applied_timeout=0.2) as s:
            code = s.code()
            refused(await s.finish(await s.token(), code), 504, "gateway_timeout")
            await s.service.kill()
            await s.service.start()
            refused(await s.finish(await s.token(), code), 401, "code_reused")

    run(main())


def test_a_totp_code_is_accepted_one_step_late_and_called_late_after_that() -> None:
    async def main() -> None:
        async with served_scene() as s:
            code = s.code()
            s.clock.advance(60)
            token = await s.token()
            refused(await s.finish(token, code), 401, "code_expired")
            code = s.code()
            s.clock.advance(30)
            assert (await s.finish(token, code)).status_code == 200

    run(main())


def test_a_code_for_an_authentication_started_too_long_ago_is_refused() -> None:
    async def main() -> None:
        async with served_scene(mfa={"code_lifetime": 60}) as s:
            token = await s.token()
            s.clock.advance(60)
            refused(await s.finish(token, s.code()), 401, "code_expired")

    run(main())


def test_the_e_mailed_code_admits_and_works_once() -> None:
    async def main() -> None:
        async with served_scene() as s:
            token = await s.token("email")
            code = s.mailed_code()
            assert (await s.finish(token, code)).status_code == 200
            refused(await s.finish(token, code), 401, "code_reused")
            refused(await s.finish(await s.token("email"), code), 401, "wrong_code")

    run(main())


def test_an_e_mailed_code_expires() -> None:
    async def main() -> None:
        async with served_scene(mfa={"code_lifetime": 60}) as s:
            token = await s.token("email")
            s.clock.advance(60)
            refused(await s.finish(token, s.mailed_code()), 401, "code_expired")

    run(main())


def test_a_newer_start_makes_the_earlier_code_useless() -> None:
    async def main() -> None:
        async with served_scene() as s:
            token = await s.token("email")
            code = s.mailed_code()
            newer = await s.token("email")
            refused(await s.finish(token, code), 401, "code_expired")
            assert (await s.finish(newer, s.mailed_code())).status_code == 200

    run(main())


def test_an_e_mailed_code_is_not_a_totp_code() -> None:
    async def main() -> None:
        async with served_scene() as s:
            refused(await s.finish(await s.token("email"), s.code()), 401, "wrong_code")

    run(main())


def test_a_method_that_the_user_has_not_enabled_is_a_clear_error() -> None:
    async def main() -> None:
        async with scene() as s:
            core = s.service.core
            core.mfa.disable_totp("alice")
            refused(await s.start("totp"), 403, "method_not_enabled")
            assert "totp is not enabled" in (await s.start("totp")).json()["message"]
            assert (await s.start("email")).status_code == 200
            core.mfa.enable_email("alice", enabled=False)
            refused(await s.start("email"), 403, "method_not_enabled")

    run(main())


def test_a_method_disabled_after_the_start_does_not_admit() -> None:
    async def main() -> None:
        async with served_scene() as s:
            totp, core = await s.token(), s.service.core
            core.mfa.disable_totp("alice")
            refused(await s.finish(totp, s.code()), 403, "method_not_enabled")
            email = await s.token("email")
            core.mfa.enable_email("alice", enabled=False)
            refused(await s.finish(email, s.mailed_code()), 403, "method_not_enabled")

    run(main())


def test_too_many_wrong_codes_lock_the_user_out_for_a_while_and_over_a_restart() -> None:
    async def main() -> None:
        async with served_scene(mfa={"max_failures": 3, "window": 100}) as s:
            token = await s.token()
            for _ in range(3):
                refused(await s.finish(token, s.wrong_code()), 401, "wrong_code")
                s.clock.advance(1)
            response = await s.finish(token, s.code())
            refused(response, 429, "too_many_attempts")
            assert response.headers["retry-after"] == "97"
            refused(await s.start("email"), 429, "too_many_attempts")
            await s.service.stop()
            await s.service.start()
            refused(await s.finish(token, s.code()), 429, "too_many_attempts")

    run(main())


def test_the_lock_ends_after_the_window() -> None:
    async def main() -> None:
        async with served_scene(mfa={"max_failures": 1, "window": 100}) as s:
            refused(await s.finish(await s.token(), s.wrong_code()), 401, "wrong_code")
            refused(await s.start(), 429, "too_many_attempts")
            s.clock.advance(100)
            await s.connect()

    run(main())


def test_e_mails_are_rate_limited() -> None:
    async def main() -> None:
        async with scene(mfa={"max_mails": 2, "window": 100}) as s:
            await s.token("email")
            await s.token("email")
            refused(await s.start("email"), 429, "too_many_attempts")
            assert (await s.start("totp")).status_code == 200
            assert len(list(s.mail.glob("*.eml"))) == 2

    run(main())


def test_a_mail_server_that_is_down_is_a_clear_error() -> None:
    async def main() -> None:
        async with scene(smtp={"port": 1, "timeout": 1}) as s:
            refused(await s.start("email"), 502, "mail_failed")

    run(main())


def test_another_users_device_and_an_unknown_one_look_the_same() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.add_user("bob")
            answers = [
                await s.post("mfa/start", user=user, device_public_key=key, method="totp")
                for user, key in (("bob", s.laptop), ("nobody", s.laptop), ("alice", "unknown"))
            ]
            assert {(a.status_code, a.text) for a in answers} == {(404, answers[0].text)}

    run(main())


def test_an_unknown_token_is_refused() -> None:
    async def main() -> None:
        async with scene() as s:
            refused(await s.finish("made-up", "123456"), 401, "unknown_challenge")

    run(main())


def test_no_authentication_is_started_where_none_is_required() -> None:
    async def main() -> None:
        async with scene() as s:
            await s.service.admin.change_location("hq", mfa_required=False)
            refused(await s.start(), 409, "mfa_not_required")

    run(main())


def test_a_new_connection_needs_a_new_authentication_and_replaces_the_session() -> None:
    async def main() -> None:
        async with served_scene() as s:
            first = await s.connect()
            s.clock.advance(30)
            second = await s.connect()
            assert first["id"] != second["id"]
            assert first["preshared_key"] != second["preshared_key"]
            ended, live = await s.service.admin.sessions()
            assert (ended["id"], ended["reason"]) == (first["id"], "replaced")
            assert (live["id"], live["ended_at"]) == (second["id"], None)
            assert [e.name for e in s.gateway.events] == ["session_granted"] * 2

    run(main())


def test_codes_and_totp_secrets_are_not_answered_to_clients() -> None:
    async def main() -> None:
        async with scene() as s:
            body = (await s.start("email")).text
            assert s.mailed_code() not in body
            assert s.totp.secret not in body

    run(main())
