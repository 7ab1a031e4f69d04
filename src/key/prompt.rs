//! Prompts for the key on a terminal without echoing it.

use std::io::{Write, stderr, stdin};

use nix::sys::termios::{self, LocalFlags, SetArg, SpecialCharacterIndices, Termios};

/// Keeps the echo of the terminal on stdin off until it is dropped.
pub(super) struct EchoGuard(Termios);

impl EchoGuard {
    /// Turns the echo of stdin off and prompts on stderr; `None` if stdin is not a terminal.
    ///
    /// Signals from the keyboard are off meanwhile: they would end the program with the echo still off.
    /// The interrupt character (Ctrl-C) ends the line instead, and no key contains it (termios(3), `VEOL`).
    pub(super) fn disable_and_prompt() -> nix::Result<Option<Self>> {
        let Ok(before) = termios::tcgetattr(stdin()) else {
            return Ok(None);
        };
        let mut quiet = before.clone();
        quiet.local_flags -= LocalFlags::ECHO | LocalFlags::ISIG;
        quiet.local_flags |= LocalFlags::ECHONL;
        let interrupt = quiet.control_chars[SpecialCharacterIndices::VINTR as usize];
        quiet.control_chars[SpecialCharacterIndices::VEOL as usize] = interrupt;
        termios::tcsetattr(stdin(), SetArg::TCSAFLUSH, &quiet)?;
        let _ = stderr().write_all(b"OpenAI API key (not shown): ");
        Ok(Some(Self(before)))
    }
}

impl Drop for EchoGuard {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(stdin(), SetArg::TCSAFLUSH, &self.0);
    }
}
