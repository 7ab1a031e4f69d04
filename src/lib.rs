//! Lets unprivileged users run Codex without holding the OpenAI API key.
