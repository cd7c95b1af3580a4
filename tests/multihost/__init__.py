"""Tests on several Ray hosts; `testbed` makes them."""
