"""Gets a model's config.json from a Hugging Face hub and prints its path, or why it cannot.

A script for the builder's environment, whose `huggingface_hub` it uses: `python hub.py NAME CACHE`.
The last line that it prints is JSON: {"path": ...} or {"error": ...}. Imports nothing of Penstock.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    here = Path(__file__).resolve().parent  # its modules are not for this environment
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    from huggingface_hub import errors, hf_hub_download

    name, cache = sys.argv[1:]
    try:
        answer = {"path": hf_hub_download(name, "config.json", cache_dir=cache)}
    except errors.GatedRepoError:
        answer = {
            "error": "it is gated: accept its terms on its page, then set HF_TOKEN to your token"
        }
    except errors.LocalEntryNotFoundError as error:
        answer = {"error": f"the hub cannot be reached, and the cache has no copy: {error}"}
    except errors.RepositoryNotFoundError:
        answer = {
            "error": "no such model, or a private one: HF_TOKEN may hold a token that opens it"
        }
    except errors.EntryNotFoundError:
        answer = {"error": "it has no config.json: not a model for transformers"}
    except Exception as error:  # whatever the library and the network raise, it is said here
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
