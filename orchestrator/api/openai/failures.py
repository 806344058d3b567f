"""A request that ended without success -> the error that its client gets.

Knows which of our error codes are the client's own; nothing of HTTP beyond a status.
"""

from __future__ import annotations

from orchestrator.api.errors import ApiError
from orchestrator.db.views import RequestStatus
from orchestrator.errors import OF_THE_CLIENT

# Clients try again after 409 and after 5xx: what has ended here would end so again.
_FINAL = {"x-should-retry": "false"}


def failure(request: RequestStatus) -> ApiError:
    """The error of a failed or cancelled request."""
    if request.state == "cancelled":
        text = request.error_message or "The request was cancelled."
        return ApiError(409, text, code=request.error_code or "cancelled", headers=_FINAL)
    code = request.error_code or "server_error"
    text = request.error_message or "The server had an error while processing your request."
    if code in OF_THE_CLIENT:
        param, shown = OF_THE_CLIENT[code], None if code == "invalid_request" else code
        return ApiError(400, text, param=param, code=shown)
    return ApiError(500, text, type="server_error", code=code, headers=_FINAL)
