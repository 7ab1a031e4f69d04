# The module's scenarios that the machine tests go through.
{
  plain = { };
  other-port.port = 8400;
  restricted = {
    allowedUsers = [
      "alice"
      "@developers"
    ];
    httpShutdown = true;
    websocket = true;
  };
}
