"""A small real core with MFA, a client and a mail server, to run wg-agent against."""
