# Settings of the module that the machine tests switch between.
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
