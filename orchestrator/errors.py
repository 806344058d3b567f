"""The errors of Penstock, ordered by what happens next.

    PenstockError
      SpecError            refuse at the door: CLI exit 2, API 400/422; nothing was written
        ParameterError     the same, for one chat-completion parameter, in the API's own words
      NotFound             CLI exit 2, API 404
      Conflict             CLI exit 2, API 409
      RequestError         this request's fault: it fails, its neighbours go on, no retry
      WorkerError          the machine's fault: claims are released, another attempt follows
    anything else          a bug: recorded with its traceback, never swallowed

Knows nothing of YAML, SQL or HTTP: whoever raises puts the place into the error.
"""


class PenstockError(Exception):
    """Whatever Penstock refuses or reports on purpose; its text is written for the user."""


class SpecError(PenstockError):
    """`jobs/x.yaml:12: sweep.temperature[2]: expected a number from 0 to 2, got 'hot'`."""

    def __init__(self, where: str, expected: str, got: str) -> None:
        super().__init__(f"{where}: expected {expected}, got {got}")
        self.where, self.expected, self.got = where, expected, got


class ParameterError(SpecError):
    """A chat-completion parameter refused with the API's error object.

    `message`, `param` and `code` are those of `{"error": {...}}`; `type` is always
    `invalid_request_error`. `where` is empty until a door (a file, a request line) puts its
    place in front with `at`. `path` is the place inside the request, finer than `param` where
    the API names only the parameter. `item` is the position of the dataset's item whose request
    it is, where the door has it.
    """

    type = "invalid_request_error"

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, where: str = ""
    ) -> None:
        Exception.__init__(self, f"{where}: {message}" if where else message)
        self.message, self.param, self.code = message, param, code
        self.where, self.expected, self.got = where, "", ""
        self.path: tuple[str | int, ...] = ()
        self.item: int | None = None

    def at(self, where: str) -> "ParameterError":
        """The same error with the place it was found at in front of its text."""
        error = ParameterError(self.message, self.param, self.code, where)
        error.expected, error.got, error.path = self.expected, self.got, self.path
        error.item = self.item
        return error

    def to_json(self) -> dict[str, dict[str, str | None]]:
        """The API's error body; all four keys are always present."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


class NotFound(PenstockError):
    """No such job, request or model."""

    def __init__(self, kind: str, id: str) -> None:
        super().__init__(f"{kind} {id!r} does not exist")
        self.kind, self.id = kind, id


class Conflict(PenstockError):
    """The thing exists, but its state does not allow what was asked."""

    def __init__(self, kind: str, id: str, state: str) -> None:
        super().__init__(f"{kind} {id!r}: {state}")
        self.kind, self.id, self.state = kind, id, state


class RequestError(PenstockError):
    """This request cannot succeed wherever it runs; `code` is stored as its `error_code`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class WorkerError(PenstockError):
    """This machine cannot do it now; `code` names the part: model, memory, database, broker."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


OF_THE_CLIENT: dict[str, str | None] = {
    "context_length_exceeded": "messages",
    "empty_prompt": "messages",
    "grammar": None,
    "invalid_function_parameters": "tools",
    "invalid_request": None,
    "invalid_text": "messages",
    "invalid_value": None,
    "template_error": "messages",
    "unsupported_content": "messages",
}
"""Codes of RequestErrors that are the asker's own; the parameter at fault, where one alone can be.

Of all other codes of failed requests the machine is at fault.
"""
