"""Tests of the sandbox core and its client; ``parts`` holds what they share."""
