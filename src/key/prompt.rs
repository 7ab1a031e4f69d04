//! Asking for the key on a terminal without showing it.

use std::io::{IsTerminal, Write, stderr, stdin};

use nix::sys::termios::{
    LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};

/// Asked on a terminal.
const PROMPT: &[u8] = b"OpenAI API key (not shown): ";

/// A terminal on stdin whose echo is off for as long as this lives.
pub(super) struct EchoOff(Termios);

impl EchoOff {
    /// Turns the echo of stdin off and asks for the key on stderr; `None` if stdin is no terminal.
    ///
    /// No key sends a signal meanwhile, which would end the program with the echo still off. The one
    /// that interrupts (Ctrl-C) ends the line, and is a byte that no key has (termios(3), `VEOL`).
    pub(super) fn and_ask() -> nix::Result<Option<Self>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let mut quiet = before.clone();
        quiet
            .local_flags
            .remove(LocalFlags::ECHO | LocalFlags::ISIG);
        quiet.local_flags.insert(LocalFlags::ECHONL);
        let interrupt = quiet.control_chars[SpecialCharacterIndices::VINTR as usize];
        quiet.control_chars[SpecialCharacterIndices::VEOL as usize] = interrupt;
        tcsetattr(stdin(), SetArg::TCSAFLUSH, &quiet)?;
        let _ = stderr().write_all(PROMPT);
        Ok(Some(Self(before)))
    }
}

impl Drop for EchoOff {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), SetArg::TCSAFLUSH, &self.0);
    }
}
