"""Text from outside (names of files, messages of libraries) made safe to print and to write."""


def printable(text: object) -> str:
    """Text that can be printed and written: bytes of file names that are not UTF-8 as escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(error: BaseException) -> str:
    """An exception's message as one printable line; its type where it has no message."""
    return printable(" ".join((str(error) or type(error).__name__).split()))
