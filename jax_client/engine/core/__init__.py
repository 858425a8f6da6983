"""What every engine program stands on: requests, dispatch, compiled programs, adapters, memory."""
