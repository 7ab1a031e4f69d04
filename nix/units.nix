# The module's units for other systems with systemd, the same on every platform: the program is in /usr/local/bin, the key
# in /etc. Settings that only NixOS understands are left out, and so is -port.service: without switches to another
# configuration, a changed port takes a restart of the socket.
{
  self,
  nixpkgs,
}:
let
  inherit (nixpkgs) lib;
  name = "codex-responses-proxy";

  machine = lib.nixosSystem {
    modules = [
      self.nixosModules.default
      {
        nixpkgs.hostPlatform = "x86_64-linux";
        system.stateVersion = "26.05";
        services.${name} = {
          enable = true;
          keyFile = "/etc/codex-responses-proxy/key";
          package = {
            type = "derivation";
            inherit name;
            outPath = "/usr/local";
            meta.mainProgram = "codex-responses-api-proxy";
          };
        };
        systemd.sockets.${name} = {
          after = lib.mkForce [ ];
          requires = lib.mkForce [ ];
        };
        systemd.services.${name} = {
          after = lib.mkForce [
            "${name}.socket"
            "network.target"
          ];
          wants = lib.mkForce [ ];
          environment = {
            LOCALE_ARCHIVE = lib.mkForce null;
            TZDIR = lib.mkForce null;
          };
        };
      }
    ];
  };

  lines =
    unit:
    lib.filter (line: line != "" && !lib.hasPrefix "X-" line) (
      lib.splitString "\n" (
        builtins.unsafeDiscardStringContext machine.config.systemd.units.${unit}.text
      )
    );
  render =
    unit:
    lib.concatLines (
      [ "# Rendered from nix/module.nix by `nix build .#units`." ]
      ++ map (line: lib.optionalString (lib.hasPrefix "[" line) "\n" + line) (lines unit)
    );
in
lib.genAttrs [ "${name}.service" "${name}.socket" ] render
