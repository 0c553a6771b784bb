"""What several tests share, a module a topic; tests import these, never each other."""
