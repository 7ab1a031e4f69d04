# What the module renders, and what it refuses. Whether systemd likes it is the machine tests' to show.
{
  self,
  nixpkgs,
  pkgs,
}:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) system;
  inherit (import ./lib/render.nix { inherit self nixpkgs system; }) scenarios machine;

  lines =
    configuration:
    lib.splitString "\n" configuration."etc/systemd/system/codex-responses-proxy.service";
  set = configuration: line: lib.elem line (lines configuration);
  command = configuration: lib.findFirst (lib.hasPrefix "ExecStart=") "" (lines configuration);

  native = {
    hostPlatform = system;
  };
  options = settings: (machine native settings).config.services.codex-responses-proxy;
  accepts = value: (builtins.tryEval (builtins.deepSeq value true)).success;
  acceptsKeyFile = keyFile: accepts (options { inherit keyFile; }).keyFile;
  acceptsUsers = allowedUsers: accepts (options { inherit allowedUsers; }).allowedUsers;
  # The package of a machine that doesn't set one.
  packageOn =
    platform:
    (machine platform { }).options.services.codex-responses-proxy.package.default;
  complaints =
    settings:
    map (x: x.message) (
      lib.filter (x: !x.assertion && lib.hasInfix "codex" x.message) (machine native settings).config.assertions
    );

  codex = options {
    port = 8400;
    codexConfig.settings = {
      model = "a-model";
      model_providers.another.base_url = "https://another.example/v1";
    };
  };

  provider =
    settings: (options settings).codexConfig.settings.model_providers.codex-responses-proxy;

  # The options of the module, and those of the table in docs/nixos.md.
  moduleOptions = map (option: lib.concatStringsSep "." (lib.drop 2 option.loc)) (
    lib.collect lib.isOption (machine native { }).options.services.codex-responses-proxy
  );
  documentedOptions = lib.concatMap (line: lib.defaultTo [ ] (builtins.match "\\| `([^`]+)` \\|.*" line)) (
    lib.splitString "\n" (builtins.readFile ../../docs/nixos.md)
  );

  units = import ../units.nix { inherit self nixpkgs; };

  claims = with scenarios; {
    "the key is on stdin" = set plain "StandardInput=file:/run/secrets/openai-api-key";
    "everybody is served unless users are named" = !lib.hasInfix "--allow-user" (command plain);
    "named users are" = lib.hasSuffix ''"--allow-user" "alice" "--allow-user" "@developers"'' (
      command restricted
    );
    "only then other users' ids are seen" =
      set plain "PrivateUsers=true" && set restricted "PrivateUsers=false";
    "so they are for an upstream's user" =
      let
        service = (machine system { upstreamUser = "litellm"; }).systemd.services.codex-responses-proxy;
      in
      !service.serviceConfig.PrivateUsers
      && lib.elem "AF_NETLINK" service.serviceConfig.RestrictAddressFamilies
      && lib.hasInfix ''"--upstream-user" "litellm"'' service.serviceConfig.ExecStart;
    "restarts slow down" = set plain "RestartMaxDelaySec=1min" && set plain "RestartSteps=10";
    "the port is the socket's" =
      lib.hasInfix "ListenStream=127.0.0.1:8400\n"
        other-port."etc/systemd/system/codex-responses-proxy.socket";

    "a path as a string is a key file" = acceptsKeyFile "/run/secrets/key" && complaints { } == [ ];
    "a path in the store is none" =
      !acceptsKeyFile "${builtins.storeDir}/00000000000000000000000000000000-key";
    "a path literal is none" = !acceptsKeyFile /run/secrets/key;
    "a relative path is none" = !acceptsKeyFile "secrets/key";
    "a newline is none of a path" =
      lib.length (complaints {
        keyFile = "/run/secrets/key\n";
      }) == 1;
    "a list of users is taken" = acceptsUsers null && acceptsUsers [ "alice" ];
    "an empty one is not" = !acceptsUsers [ ];
    "a native machine gets the flake's package" =
      (packageOn { inherit pkgs; }).drvPath == self.packages.${system}.default.drvPath;
    "a cross-built machine gets a cross-built package" =
      let
        package = packageOn {
          buildPlatform = "x86_64-linux";
          hostPlatform = "riscv64-linux";
        };
      in
      package.stdenv.buildPlatform.system == "x86_64-linux"
      && package.stdenv.hostPlatform.system == "riscv64-linux"
      && accepts package.drvPath;
    "a machine's overlays apply to its package" =
      let
        package = packageOn {
          hostPlatform = system;
          overlays = [ (final: _: { installShellFiles = final.emptyDirectory; }) ];
        };
      in
      lib.any (input: lib.getName input == "empty-directory") package.nativeBuildInputs;

    "docs/nixos.md lists the module's options" =
      lib.naturalSort moduleOptions == lib.naturalSort documentedOptions;
    "contrib/systemd has the units that the module renders" =
      units
      == lib.mapAttrs (unit: _: builtins.readFile (../../contrib/systemd + "/${unit}")) (
        builtins.readDir ../../contrib/systemd
      );

    "Codex is led to the port" =
      codex.codexConfig.settings.model_providers.codex-responses-proxy.base_url
      == "http://127.0.0.1:8400/v1";
    "WebSocket is off by default" =
      !lib.hasInfix "--websocket" (command plain) && !provider { } ? supports_websockets;
    "websocket passes the flag and tells Codex" =
      lib.hasInfix ''"--websocket"'' (command restricted)
      && (provider { websocket = true; }).supports_websockets;
    "a machine's own settings stay" =
      codex.codexConfig.settings.model == "a-model"
      && codex.codexConfig.settings.model_providers ? another
      && codex.codexConfig.settings.model_provider == "codex-responses-proxy";
  };
  wrong = lib.attrNames (lib.filterAttrs (_: holds: !holds) claims);
in
if wrong == [ ] then
  pkgs.runCommand "codex-responses-proxy-unit" { passthru.rendered = scenarios; } ''
    printf '%s\n' ${lib.escapeShellArgs (lib.attrNames claims)} >$out
  ''
else
  throw "the module breaks its word: ${lib.concatStringsSep "; " wrong}"
