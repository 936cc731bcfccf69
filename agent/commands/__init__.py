"""The commands of ``wg-agent``: each module's ``execute`` takes the arguments, returns the exit code."""
