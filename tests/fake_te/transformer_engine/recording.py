"""What the stand-in was asked to do, in order."""

record: list[dict] = []
