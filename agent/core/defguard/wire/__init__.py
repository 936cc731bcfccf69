"""Defguard's messages: ``make proto`` makes the modules here from the ``.proto`` files beside them."""
